// SPDX-License-Identifier: Apache-2.0
/**
 * Parameter data to the initiator, and parameter lists from it, cut to the lengths that both sides
 * allow.
 */
import type { ScsiCommand } from '../../device/handler.js';

/**
 * Delivers `data`, cut at the ALLOCATION LENGTH (SPC-5: truncation is no error) and at the buffer.
 * Nothing behind it is written.
 */
export function respond(command: ScsiCommand, data: Uint8Array, allocationLength: number): void {
  const length = Math.min(data.length, allocationLength, command.dataLength);
  if (length > 0) {
    command.dataIn.copyFrom(length === data.length ? data : data.subarray(0, length));
  }
}

/** The parameter list: what arrived, at most `length` bytes of it (PARAMETER LIST LENGTH). */
export function parameterList(command: ScsiCommand, length: number): Uint8Array {
  const available = Math.min(length, command.dataLength);
  if (available === 0) return new Uint8Array(0);
  return command.dataOut.slice(0, available).toBytes();
}
