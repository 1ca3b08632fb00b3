// SPDX-License-Identifier: Apache-2.0
/**
 * A direct-access block device (SBC-4) over a BlockStore. It decodes a CDB, checks what the command
 * table says, lets the command family do the work, and completes the command exactly once: at once
 * with a synchronous store, else when the store's promise settles. A store's failure becomes sense
 * data here and is never thrown on; only a failing `complete()` is.
 *
 * Everything runs on the JavaScript thread that calls `handle`. A command's buffers are used only
 * until its completion. `close` waits for nothing: the caller calls it when all commands have
 * settled.
 */
import { channel } from 'node:diagnostics_channel';
import type { MaybePromise } from '../device/data.js';
import type { ExpressLane } from '../device/express-lane.js';
import type { CommandHandler, ScsiCommand, TaskManagement } from '../device/handler.js';
import { ArgumentError } from '../errors.js';
import type { BlockStore } from '../store/block-store.js';
import { chain, isPromise } from '../store/maybe.js';
import { readU16 } from './bytes.js';
import { type CdbField, CommandEntry } from './command-spec.js';
import { blockCommands } from './commands/index.js';
import { registerUnit, unregisterUnit } from './copy/copy-manager.js';
import { Express } from './express.js';
import { decodeOperation, MediumOperation } from './hindrance.js';
import { Identity, type IdentityOptions } from './identity.js';
import { LogicalUnit } from './logical-unit.js';
import type { AskNexuses } from './nexuses.js';
import { type PortGroups, SINGLE_PORT_GROUP } from './port-groups.js';
import { type SenseError, sense, toSense } from './sense.js';
import type { StateStorage } from './state-storage.js';

/** How the device presents itself. */
export interface BlockDeviceOptions extends IdentityOptions {
  /** The medium can be ejected (RMB). Default false. */
  removable?: boolean | undefined;
  /**
   * Longest transfer of one command in bytes (MAXIMUM TRANSFER LENGTH), enforced. Default: no
   * limit.
   */
  maxTransferLength?: number | undefined;
  /**
   * Whether the first command after `open` is answered with the unit attention POWER ON OCCURRED
   * (29h/00h), which tells initiators that mode parameters are back to their defaults. Default:
   * true, but false for a removable device, where Linux takes any unit attention for a changed
   * medium.
   */
  powerOnAttention?: boolean | undefined;
  /**
   * READ (32), WRITE (32) and the other 32-byte commands. Default false: they exist for protection
   * information, which this device does not have, and libiscsi's suite can't take their usage maps.
   */
  longCommands?: boolean | undefined;
  /**
   * EXTENDED COPY may copy between the devices of this process that have the same group. TCMU does not say who
   * sent a command: an initiator that may use one of them can read and write all of them by copies. Default:
   * none, and a device copies only within itself.
   */
  copyGroup?: string | undefined;
  /** Where mode pages saved by MODE SELECT are kept. Default: nowhere, and saving is refused. */
  modePageStorage?: StateStorage | undefined;
  /**
   * Where it is kept that a FORMAT UNIT or SANITIZE has begun and not succeeded. With it, one that the end of
   * the process cuts short has failed at the next start, and the medium is not accessible until it is
   * formatted or sanitized (SBC-4). Default: nowhere, and a restart makes accessible what is left then.
   */
  operationStorage?: StateStorage | undefined;
  /**
   * The target port groups that REPORT TARGET PORT GROUPS tells of. Default: one group, 0, with relative
   * target port 1, active and optimized.
   */
  portGroups?: PortGroups | undefined;
  /**
   * Asks for the I_T nexuses (iSCSI sessions, say) there are now; undefined when they can't be told. TCMU
   * does not say which one sent a command, so they serve only to end a PREVENT ALLOW MEDIUM REMOVAL whose nexus is
   * gone (an ejection waits for the answer, up to 10 s, and is refused without one), to tell others of changed
   * mode parameters, and to forget results of copies nobody can ask for any more.
   */
  nexuses?: AskNexuses | undefined;
  /** Told of every failure of the store; must not throw. They are on the diagnostics channel too. */
  onStoreFailure?: ((failure: StoreFailure) => void) | undefined;
}

/** Published on the diagnostics channel `tcmu:scsi:error` for every failure of a store. */
export interface StoreFailure {
  /** The device whose store failed. */
  readonly device: BlockDevice;
  /** The command that was under way. */
  readonly command: ScsiCommand;
  /** What the store threw. */
  readonly error: unknown;
  /** What the initiator was told. */
  readonly sense: SenseError;
}

const failures = channel('tcmu:scsi:error');

/** @throws SenseError for the first field that must be zero and is not. */
function checkRefusals(cdb: Uint8Array, refusals: readonly CdbField[]): void {
  for (const { byte, mask } of refusals) {
    // The pointer names the most significant bit of the field (SPC-5, BIT POINTER).
    if (((cdb[byte] as number) & mask) !== 0) {
      throw sense.invalidFieldInCdb({ byte, bit: 31 - Math.clz32(mask) });
    }
  }
}

/** A disk: the handler that serves a `BlockStore` as SCSI commands. */
export class BlockDevice implements CommandHandler {
  readonly #unit: LogicalUnit;
  readonly #powerOnAttention: boolean;
  readonly #onStoreFailure: BlockDeviceOptions['onStoreFailure'];
  #open = false;

  /** @throws ArgumentError for a name or length that does not fit. */
  constructor(store: BlockStore, options: BlockDeviceOptions) {
    const { removable = false, maxTransferLength = 0, powerOnAttention = !removable } = options;
    if (!Number.isSafeInteger(maxTransferLength) || maxTransferLength < 0) {
      throw new ArgumentError(`maxTransferLength ${maxTransferLength} is no number of bytes`);
    }
    this.#unit = new LogicalUnit(store, new Identity(options), {
      removable,
      maxTransferLength,
      longCommands: options.longCommands ?? false,
      copyGroup: options.copyGroup,
      modePageStorage: options.modePageStorage,
      operationStorage: options.operationStorage,
      portGroups: options.portGroups ?? SINGLE_PORT_GROUP,
      nexuses: options.nexuses,
    });
    this.#powerOnAttention = powerOnAttention;
    this.#onStoreFailure = options.onStoreFailure;
  }

  /** The store it serves. */
  get store(): BlockStore {
    return this.#unit.store;
  }

  /**
   * Opens the store and takes its size and capabilities.
   * @throws ArgumentError when they are none or contradict each other; the store is closed again.
   */
  open(): MaybePromise<void> {
    const unit = this.#unit;
    return chain(unit.store.open?.(), () => {
      const fail = (error: unknown): MaybePromise<never> =>
        chain(unit.store.close?.(), () => {
          throw error;
        });
      try {
        unit.open(blockCommands);
        const { modePageStorage, operationStorage } = unit.options;
        const loaded = chain(modePageStorage?.load(), (pages) =>
          chain(operationStorage?.load(), (operation) => {
            if (pages !== undefined) unit.modePages.load(pages);
            if (operation !== undefined) unit.hindrance = decodeOperation(operation);
            unit.cacheModeChanged();
            this.#open = true;
            registerUnit(unit);
            if (this.#powerOnAttention) unit.raiseAttention(sense.powerOnOccurred());
          }),
        );
        return isPromise(loaded) ? (loaded as Promise<void>).catch(fail) : loaded;
      } catch (error) {
        return fail(error);
      }
    });
  }

  /** Ends what runs by itself (a FORMAT UNIT, SANITIZE, or copy), then closes the store. */
  close(): MaybePromise<void> {
    if (!this.#open) return;
    this.#open = false;
    const unit = this.#unit;
    unit.express?.detach();
    unit.express = undefined;
    unregisterUnit(unit);
    const operation = unit.hindrance instanceof MediumOperation ? unit.hindrance : undefined;
    operation?.stop();
    return chain(operation?.finished, () =>
      chain(unit.copies.close(), () => chain(unit.store.close?.(), () => {})),
    );
  }

  /**
   * Takes a changed `store.size` over and tells the initiator by the unit attention CAPACITY DATA
   * HAS CHANGED. Call it after the store has been resized.
   * @throws ArgumentError when the new size is none; the old one stays in force.
   */
  capacityChanged(): void {
    const before = this.#unit.blocks;
    this.#unit.measure();
    if (this.#unit.blocks !== before) this.#unit.raiseAttention(sense.capacityDataHasChanged());
  }

  /** Tells the initiator that `portGroups` answers something new: ASYMMETRIC ACCESS STATE CHANGED. */
  portGroupsChanged(): void {
    this.#unit.raiseAttention(sense.asymmetricAccessStateChanged());
  }

  /** @internal */
  express(lane: ExpressLane): void {
    const unit = this.#unit;
    // One lane at a time: a second device with this handler sends every command through it.
    if (unit.store.fileMap === undefined || unit.express !== undefined) return;
    lane.counters.set(unit.counters);
    unit.counters = lane.counters;
    unit.express = new Express(unit, lane);
  }

  /**
   * A logical unit or target reset puts the mode parameters back; LIO raises the unit attention
   * itself.
   */
  taskManagement(tmr: TaskManagement): void {
    if (/reset/.test(tmr.type)) {
      const unit = this.#unit;
      unit.express?.close();
      unit.modePages.reset();
      unit.cacheModeChanged();
      unit.removal.allow();
      unit.power = undefined;
    }
  }

  /**
   * Carries one command out and completes it. Never throws for what a command or store does wrong.
   */
  handle(command: ScsiCommand): MaybePromise<void> {
    const { express } = this.#unit;
    let answer: MaybePromise<unknown>;
    let entry: CommandEntry | undefined;
    try {
      entry = this.#decode(command.cdb);
      express?.began(entry);
      answer = entry.run(this.#unit, command);
    } catch (error) {
      express?.ended(entry);
      return this.#fail(command, entry, error);
    }
    if (!isPromise(answer)) {
      express?.ended(entry);
      return command.complete();
    }
    const ran = entry;
    return Promise.resolve(answer).then(
      () => {
        express?.ended(ran);
        command.complete();
      },
      (error) => {
        express?.ended(ran);
        this.#fail(command, ran, error);
      },
    );
  }

  #decode(cdb: Uint8Array): CommandEntry {
    if (!this.#open) throw sense.notReadyBecomingReady();
    const found = this.#unit.commands.at(cdb[0] as number);
    const entry = found instanceof CommandEntry ? found : this.#serviceAction(cdb, found);
    if (cdb.length < entry.length) throw sense.invalidFieldInCdb({ byte: cdb.length });
    const unit = this.#unit;
    if (unit.attentions.length > 0 && !entry.ignoresAttention) {
      throw unit.attentions.shift() as SenseError;
    }
    const refusal = unit.hindrance?.refusal(entry);
    if (refusal !== undefined) throw refusal;
    if (entry.medium !== 'none') {
      // TEST UNIT READY leaves the power condition as it is (SPC-5, power conditions).
      if (unit.power !== undefined && entry.spec.opcode !== 0x00) unit.power = undefined;
      if (unit.ejected) throw sense.mediumNotPresent();
      if (entry.medium === 'write' && unit.writeProtected) {
        throw unit.store.readOnly ? sense.writeProtected() : sense.softwareWriteProtected();
      }
    }
    if (
      ((cdb[1] as number) & entry.refusedFlags) !== 0 ||
      ((cdb[entry.controlByte] as number) & entry.refusedControl) !== 0 ||
      entry.refusesElsewhere
    ) {
      checkRefusals(cdb, entry.refusals);
    }
    return entry;
  }

  #serviceAction(
    cdb: Uint8Array,
    actions: ReadonlyMap<number, CommandEntry> | undefined,
  ): CommandEntry {
    if (actions === undefined) throw sense.invalidOperationCode();
    const variable = cdb[0] === 0x7f;
    // A CDB that ends before its service action.
    if (cdb.length < (variable ? 10 : 2)) throw sense.invalidFieldInCdb({ byte: cdb.length });
    const entry = variable ? actions.get(readU16(cdb, 8)) : actions.get((cdb[1] as number) & 0x1f);
    if (entry === undefined) {
      throw sense.invalidFieldInCdb(variable ? { byte: 8 } : { byte: 1, bit: 4 });
    }
    // SPC-5, variable length CDBs: ADDITIONAL CDB LENGTH must be the one of the command.
    if (variable && cdb[7] !== entry.length - 8) throw sense.invalidFieldInCdb({ byte: 7 });
    return entry;
  }

  #fail(command: ScsiCommand, entry: CommandEntry | undefined, error: unknown): void {
    const answer = toSense(error, entry?.medium === 'read' ? 'read' : 'write');
    // Sense data without a cause is an answer; with one it is the translation of a failure.
    if (answer !== error || answer.cause !== undefined) {
      const failure: StoreFailure = { device: this, command, error, sense: answer };
      this.#onStoreFailure?.(failure);
      if (failures.hasSubscribers) failures.publish(failure);
    }
    const format = this.#unit.modePages?.descriptorSense ? 'descriptor' : 'fixed';
    command.complete(answer.status, answer.encode(format));
  }
}
