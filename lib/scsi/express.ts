// SPDX-License-Identifier: Apache-2.0
/**
 * Decides when plain reads and writes of a logical unit may pass by its handler on the device's express
 * lane: while the store gives its word (`BlockStore.fileMap`), and the unit is in no state in which a READ
 * or WRITE would get another answer than GOOD with its data.
 *
 * The lane is closed while any other command runs, and by every change of state outside of commands; it is
 * opened again only here, when a command has ended and all is plain. Forgetting to open costs speed only.
 */
import { commandEnd, commandStart } from '../device/diagnostics.js';
import type { ExpressLane } from '../device/express-lane.js';
import type { CommandEntry } from './command-spec.js';
import type { LogicalUnit } from './logical-unit.js';

export class Express {
  readonly #unit: LogicalUnit;
  readonly #lane: ExpressLane;
  readonly #unwatch: () => void;
  /** Commands that run and are no plain reads or writes. */
  #others = 0;
  #detached = false;

  constructor(unit: LogicalUnit, lane: ExpressLane) {
    this.#unit = unit;
    this.#lane = lane;
    const { fileMap } = unit.store;
    if (fileMap !== undefined) lane.use(fileMap);
    this.#unwatch = fileMap?.watch(() => lane.close()) ?? (() => {});
  }

  /** Before a command runs. */
  began(entry: CommandEntry): void {
    if (entry.plain) return;
    this.#others++;
    this.#lane.close();
  }

  /** When a command has ended, either way; without an entry, when it was refused before it began. */
  ended(entry: CommandEntry | undefined): void {
    if (entry?.plain === false) this.#others--;
    if (this.#others === 0 && !this.#lane.isOpen && !this.#detached) this.#open();
  }

  /** Something changed that reads or writes depend on. */
  close(): void {
    this.#lane.close();
  }

  /** For good. */
  detach(): void {
    this.#detached = true;
    this.#unwatch();
    this.#lane.close();
  }

  #open(): void {
    const unit = this.#unit;
    const { fileMap } = unit.store;
    if (fileMap === undefined || unit.attentions.length > 0 || unit.hindrance !== undefined) return;
    // A command that uses the medium makes the power condition active.
    if (unit.power !== undefined || unit.ejected || fileMap.readable + fileMap.writable === 0)
      return;
    // Who traces commands wants to see them all.
    if (commandStart.hasSubscribers || commandEnd.hasSubscribers) return;
    const { blockSize, blocks, modePages, limits } = unit;
    const volatileWrites =
      unit.volatile &&
      !unit.writeThrough &&
      !unit.writeProtected &&
      !modePages.thresholdsEnabled &&
      !unit.lock.contended;
    const within = (bytes: number) => Math.min(blocks, Math.floor(bytes / blockSize));
    this.#lane.open({
      blockSize,
      readBlocks: within(fileMap.readable),
      writeBlocks: volatileWrites ? within(fileMap.writable) : 0,
      mostBytes: limits.transfer || Number.MAX_SAFE_INTEGER,
    });
  }
}
