// What a browser must be able to do. Each is in Chrome, Edge, Firefox and Safari since 2023.

// The smallest module with a vector: a function that returns sixteen zero bytes.
const SIMD_MODULE = Uint8Array.of(
  ...[0x00, 0x61, 0x73, 0x6d, 0x01, 0x00, 0x00, 0x00], // "\0asm", version 1
  ...[0x01, 0x05, 0x01, 0x60, 0x00, 0x01, 0x7b], // types: () → v128
  ...[0x03, 0x02, 0x01, 0x00], // functions: one of that type
  ...[0x0a, 0x16, 0x01, 0x14, 0x00, 0xfd, 0x0c, ...new Array(16).fill(0), 0x0b], // code: v128.const 0
);

/** The first thing that the search needs and this browser lacks, or null. */
export function missingFeature() {
  if (typeof WebAssembly !== "object") return "WebAssembly";
  if (!WebAssembly.validate(SIMD_MODULE)) return "WebAssembly SIMD";
  if (typeof DecompressionStream !== "function") return "DecompressionStream";
  if (typeof Worker !== "function") return "web workers";
  return null;
}
