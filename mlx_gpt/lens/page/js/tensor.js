// Arrays of numbers with a shape, and the operations of the forward pass. Axis letters are those of model.js.

/** Numbers in row-major order: `shape` is a list of lengths, `data` a typed array, a Float32Array by default. */
export class Tensor {
  constructor(shape, data = new Float32Array(sizeOf(shape))) {
    this.shape = shape;
    this.data = data;
  }
}

/** Return the number of elements of a shape. */
export function sizeOf(shape) {
  return shape.reduce((product, length) => product * length, 1);
}

/** Return the part of a tensor at the given indices of its first axes, as a view: row(pattern, head, query) -> (T). */
export function row(tensor, ...index) {
  const size = sizeOf(tensor.shape.slice(index.length));
  const start = index.reduce((flat, i, axis) => flat * tensor.shape[axis] + i, 0) * size;
  return tensor.data.subarray(start, start + size);
}

/** Return one element: at(pattern, head, query, key). */
export function at(tensor, ...index) {
  return row(tensor, ...index)[0];
}

/** Return some rows of a tensor: (V, ...) and n indices -> (n, ...). */
export function takeRows(tensor, indices) {
  const taken = new Tensor([indices.length, ...tensor.shape.slice(1)]);
  indices.forEach((index, i) => row(taken, i).set(row(tensor, index)));
  return taken;
}

/** Return the sum of two tensors of one shape. */
export function add(a, b) {
  return new Tensor(a.shape, a.data.map((value, i) => value + b.data[i]));
}

/** Return the norm of a vector, sqrt(x . x). */
export function norm(x) {
  return Math.sqrt(dot(x, x));
}

/** Return the dot product of two vectors. */
export function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

/** Apply a linear layer, x @ weight.T + bias: (n, K), (M, K), (M) or null -> (n, M). */
export function linear(x, weight, bias = null) {
  const [n, K] = x.shape;
  const M = weight.shape[0];
  const out = new Tensor([n, M]);
  multiply({ data: x.data, start: 0, step: K, n }, { data: weight.data, start: 0, step: K, n: M }, K, out.data, 0);
  if (bias !== null) {
    for (let i = 0; i < n; i++) {
      for (let j = 0; j < M; j++) out.data[i * M + j] += bias.data[j];
    }
  }
  return out;
}

/**
 * Write the dot products of all rows of a with all rows of b, `out[i, j] = a[i] . b[j]`, from `outStart` on.
 *
 * a and b are `{data, start, step, n}`: n rows of K numbers, `step` apart. Two rows of a and four of b are multiplied at
 * once: each number that is loaded is used in several products, which is three times as fast as one sum at a time.
 */
export function multiply(a, b, K, out, outStart) {
  const evenA = a.n - (a.n % 2);
  const evenB = b.n - (b.n % 4);
  for (let i = 0; i < evenA; i += 2) {
    for (let j = 0; j < evenB; j += 4) {
      multiplyTile(a.data, a.start + i * a.step, a.step, b.data, b.start + j * b.step, b.step, K, out,
        outStart + i * b.n + j, b.n);
    }
  }
  for (let i = 0; i < a.n; i++) {
    for (let j = i < evenA ? evenB : 0; j < b.n; j++) { // what no tile holds
      const x = a.start + i * a.step;
      const w = b.start + j * b.step;
      let sum = 0;
      for (let k = 0; k < K; k++) sum += a.data[x + k] * b.data[w + k];
      out[outStart + i * b.n + j] = sum;
    }
  }
}

function multiplyTile(a, a0, aStep, b, b0, bStep, K, out, out0, outStep) {
  const a1 = a0 + aStep;
  const b1 = b0 + bStep;
  const b2 = b1 + bStep;
  const b3 = b2 + bStep;
  let s00 = 0, s01 = 0, s02 = 0, s03 = 0, s10 = 0, s11 = 0, s12 = 0, s13 = 0;
  for (let k = 0; k < K; k++) {
    const x0 = a[a0 + k], x1 = a[a1 + k];
    const w0 = b[b0 + k], w1 = b[b1 + k], w2 = b[b2 + k], w3 = b[b3 + k];
    s00 += x0 * w0; s01 += x0 * w1; s02 += x0 * w2; s03 += x0 * w3;
    s10 += x1 * w0; s11 += x1 * w1; s12 += x1 * w2; s13 += x1 * w3;
  }
  out[out0] = s00; out[out0 + 1] = s01; out[out0 + 2] = s02; out[out0 + 3] = s03;
  const next = out0 + outStep;
  out[next] = s10; out[next + 1] = s11; out[next + 2] = s12; out[next + 3] = s13;
}

/** Return the softmax of a vector of logits or scores; -Infinity gets 0. */
export function softmax(x) {
  let max = -Infinity;
  for (const value of x) max = Math.max(max, value);
  const exps = Float64Array.from(x, (value) => Math.exp(value - max));
  let sum = 0;
  for (const value of exps) sum += value;
  return Float32Array.from(exps, (value) => value / sum);
}

/** Return the scale of each row, (T, 1), and the rows centered and divided by it, (T, C). */
export function normalize(x, epsilon) {
  const [T, C] = x.shape;
  const scale = new Tensor([T, 1]);
  const normalized = new Tensor([T, C]);
  for (let t = 0; t < T; t++) {
    const values = row(x, t);
    let mean = 0;
    for (const value of values) mean += value / C;
    let variance = 0;
    for (const value of values) variance += (value - mean) ** 2 / C;
    scale.data[t] = Math.sqrt(variance + epsilon);
    for (let c = 0; c < C; c++) normalized.data[t * C + c] = (values[c] - mean) / scale.data[t];
  }
  return { scale, normalized };
}
