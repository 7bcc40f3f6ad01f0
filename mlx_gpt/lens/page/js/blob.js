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

/**
 * Return finite float16 numbers, given by their bits, as float32.
 *
 * The bits of a float16, moved to the places of a float32, are those of a number 2^112 times smaller: the exponents
 * count from -15 and from -127.
 */
export function decodeHalf(bits) {
  const values = new Float32Array(bits.length);
  const words = new Uint32Array(values.buffer);
  for (let i = 0; i < bits.length; i++) words[i] = ((bits[i] & 0x8000) << 16) | ((bits[i] & 0x7fff) << 13);
  for (let i = 0; i < bits.length; i++) values[i] *= 2 ** 112;
  return values;
}
