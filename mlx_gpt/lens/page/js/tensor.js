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
  const sum = new Tensor(a.shape);
  for (let i = 0; i < sum.data.length; i++) sum.data[i] = a.data[i] + b.data[i];
  return sum;
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
  multiply(rows(x.data, 0, K, n), rows(weight.data, 0, K, M), K, rows(out.data, 0, M, n));
  if (bias !== null) {
    for (let i = 0; i < n; i++) {
      for (let j = 0; j < M; j++) out.data[i * M + j] += bias.data[j];
    }
  }
  return out;
}

/** Describe n rows in an array of numbers, of which the first begins at `start` and each other `step` further. */
export function rows(data, start, step, n) {
  return { data, start, step, n };
}

/**
 * Write the dot products of the rows of a with those of b, K numbers each, to the rows of out: out[i][j] = a[i] . b[j].
 *
 * Two rows of a and four of b are multiplied at once: a number that is loaded is used in several products, which is
 * three times as fast as one sum at a time.
 */
export function multiply(a, b, K, out) {
  const evenA = a.n - (a.n % 2);
  const evenB = b.n - (b.n % 4);
  for (let i = 0; i < evenA; i += 2) {
    for (let j = 0; j < evenB; j += 4) multiplyTile(a, i, b, j, K, out);
  }
  for (let i = 0; i < a.n; i++) {
    for (let j = i < evenA ? evenB : 0; j < b.n; j++) { // what no tile holds
      const x = a.start + i * a.step;
      const w = b.start + j * b.step;
      let sum = 0;
      for (let k = 0; k < K; k++) sum += a.data[x + k] * b.data[w + k];
      out.data[out.start + i * out.step + j] = sum;
    }
  }
}

function multiplyTile(a, i, b, j, K, out) {
  const x = a.data, a0 = a.start + i * a.step, a1 = a0 + a.step;
  const w = b.data, b0 = b.start + j * b.step, b1 = b0 + b.step, b2 = b1 + b.step, b3 = b2 + b.step;
  let s00 = 0, s01 = 0, s02 = 0, s03 = 0, s10 = 0, s11 = 0, s12 = 0, s13 = 0;
  for (let k = 0; k < K; k++) {
    const x0 = x[a0 + k], x1 = x[a1 + k];
    const w0 = w[b0 + k], w1 = w[b1 + k], w2 = w[b2 + k], w3 = w[b3 + k];
    s00 += x0 * w0; s01 += x0 * w1; s02 += x0 * w2; s03 += x0 * w3;
    s10 += x1 * w0; s11 += x1 * w1; s12 += x1 * w2; s13 += x1 * w3;
  }
  const y = out.data, y0 = out.start + i * out.step + j, y1 = y0 + out.step;
  y[y0] = s00; y[y0 + 1] = s01; y[y0 + 2] = s02; y[y0 + 3] = s03;
  y[y1] = s10; y[y1 + 1] = s11; y[y1 + 2] = s12; y[y1 + 3] = s13;
}

/** Return the softmax of a vector of logits or scores; -Infinity gets 0. */
export function softmax(x) {
  let max = -Infinity;
  for (let i = 0; i < x.length; i++) if (x[i] > max) max = x[i];
  const exps = new Float32Array(x.length);
  let sum = 0;
  for (let i = 0; i < x.length; i++) {
    exps[i] = Math.exp(x[i] - max);
    sum += exps[i];
  }
  for (let i = 0; i < x.length; i++) exps[i] /= sum;
  return exps;
}

/** Return the scale of each row, (T, 1), and the rows centered and divided by it, (T, C). */
export function normalize(x, epsilon) {
  const [T, C] = x.shape;
  const scale = new Tensor([T, 1]);
  const normalized = new Tensor([T, C]);
  for (let t = 0; t < T; t++) {
    let mean = 0;
    for (let i = t * C; i < (t + 1) * C; i++) mean += x.data[i] / C;
    let variance = 0;
    for (let i = t * C; i < (t + 1) * C; i++) variance += (x.data[i] - mean) ** 2 / C;
    scale.data[t] = Math.sqrt(variance + epsilon);
    for (let i = t * C; i < (t + 1) * C; i++) normalized.data[i] = (x.data[i] - mean) / scale.data[t];
  }
  return { scale, normalized };
}

/** Return n rows of a matrix, or n numbers of a vector, from one on, as a view. */
export function rowsOf(tensor, start, n) {
  const size = sizeOf(tensor.shape.slice(1));
  return new Tensor([n, ...tensor.shape.slice(1)], tensor.data.subarray(start * size, (start + n) * size));
}
