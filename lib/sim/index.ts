/**
 * `tcmu/sim`: a simulated kernel, to write, run and test a handler anywhere.
 * @packageDocumentation
 */
export type { RingEntry, Segment } from './ring-entries.js';
export {
  type CommandRequest,
  type CommandResult,
  SimulatedDevice,
  type SimulatedDeviceOptions,
  type SimulatedDeviceState,
  type SimulatedFaults,
} from './simulated-device.js';
