// SPDX-License-Identifier: Apache-2.0
/**
 * Tracing through node:diagnostics_channel: nothing is built unless somebody listens. The package
 * logs nothing by itself. Whoever wants to see every command subscribes before the device is opened, or opens
 * it with `express: false`: plain reads and writes may pass by handlers and channels otherwise.
 *
 * | channel | message |
 * | --- | --- |
 * | `tcmu:command:start` | `{ device, command }` before the handler is called |
 * | `tcmu:command:end` | `{ device, command, status }` when the completion goes to the kernel |
 * | `tcmu:handler:error` | `{ device, command, error }`: a handler threw, or broke its contract |
 * | `tcmu:device:error` | `{ device, error }`: the device was lost, a buffer escaped, a mapping leaked |
 */
import { channel } from 'node:diagnostics_channel';

export const commandStart = channel('tcmu:command:start');
export const commandEnd = channel('tcmu:command:end');
export const handlerError = channel('tcmu:handler:error');
export const deviceError = channel('tcmu:device:error');
