// SPDX-License-Identifier: Apache-2.0
/** The parts to build on: the store, and what it is made of. The command line is `cli.ts`. */
export { resolvePath } from './allowed-path.js';
export { FileStore, type FileStoreOptions } from './file-store.js';
export { GroupSync } from './group-sync.js';
