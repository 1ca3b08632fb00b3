// SPDX-License-Identifier: Apache-2.0
/**
 * `tcmu-qcow/testing`: what the tests of any store can use to show that it survives a crash. Wrap the
 * host file in `CrashJournal.record`, let the store work, then look at what each cut leaves.
 */
export { type Change, CrashJournal, type Keep } from './crash-journal.js';
export { GuestHistory, stamped } from './guest-history.js';
export { RecordingFile, type RecordingOptions } from './recording-file.js';
