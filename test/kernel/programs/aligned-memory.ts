// SPDX-License-Identifier: Apache-2.0
/** Memory for direct I/O. */

/** Node's types leave WebAssembly to the DOM's. */
const { WebAssembly: wasm } = globalThis as unknown as {
  WebAssembly: { Memory: new (size: { initial: number }) => { readonly buffer: ArrayBuffer } };
};

const wasmPage = 65_536;

/** An ArrayBuffer of at least `bytes` bytes that starts at a page: WebAssembly's memory does. */
export function alignedMemory(bytes: number): ArrayBuffer {
  return new wasm.Memory({ initial: Math.ceil(bytes / wasmPage) }).buffer;
}
