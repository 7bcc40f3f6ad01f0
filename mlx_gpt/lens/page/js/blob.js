// The arrays of the page's data: `tensors` describes them, `blob` holds their bytes, deflated and in base64.

import { Tensor, sizeOf } from "./tensor.js";

/** Return the arrays by name, a Map of Tensor. `tensors` has the shape, type and place in `blob` of each. */
export async function readTensors({ tensors, blob }) {
  const bytes = await inflate(blob);
  return new Map(Object.entries(tensors).map(([name, tensor]) => [name, readTensor(tensor, bytes)]));
}

/** Return the bytes of base64 text of deflated bytes, as an ArrayBuffer. */
async function inflate(text) {
  const characters = atob(text);
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Response(stream).arrayBuffer();
}

function readTensor({ shape, dtype, offset }, bytes) {
  const size = sizeOf(shape);
  if (dtype === "float16") return new Tensor(shape, decodeHalf(new Uint16Array(bytes, offset, size)));
  return new Tensor(shape, new { float32: Float32Array, int32: Int32Array }[dtype](bytes, offset, size));
}

let halves = null; // the value of each of the 65,536 float16 numbers

/** Return float16 numbers, given by their bits, as float32. */
export function decodeHalf(bits) {
  halves ??= Float32Array.from({ length: 65536 }, (_, half) => valueOfHalf(half));
  return Float32Array.from(bits, (half) => halves[half]);
}

/** Return the value of a float16: 1 bit of sign, 5 of exponent, 10 of fraction (IEEE 754). */
function valueOfHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : (fraction / 1024) * 2 ** -14);
}
