// The activation functions of MLPs, by their names in a model's config (activations.py): functions of a number.

const gelu = (x) => x * normal(x);
const gelu_new = (x) => x * sigmoid(2 * Math.sqrt(2 / Math.PI) * (x + 0.044715 * x * x * x));
const relu = (x) => Math.max(x, 0);
const silu = (x) => x * sigmoid(x);
const clip = (x, low, high) => Math.min(Math.max(x, low), high);
const softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));

export const ACTIVATIONS = {
  gelu_new,
  gelu_pytorch_tanh: gelu_new,
  gelu_python_tanh: gelu_new,
  gelu_fast: gelu_new,
  gelu_accurate: gelu_new,
  gelu,
  gelu_python: gelu,
  gelu_10: (x) => clip(gelu(x), -10, 10),
  quick_gelu: (x) => x * sigmoid(1.702 * x),
  relu,
  relu2: (x) => relu(x) ** 2,
  relu6: (x) => clip(x, 0, 6),
  leaky_relu: (x) => Math.max(x, 0.01 * x),
  silu,
  swish: silu,
  hardswish: (x) => x * clip(x + 3, 0, 6) / 6,
  mish: (x) => x * Math.tanh(softplus(x)),
  sqrtsoftplus: (x) => Math.sqrt(softplus(x)),
  sigmoid,
  tanh: Math.tanh,
  laplace: (x) => normal((x - 0.707107) / 0.282095),
  linear: (x) => x,
};

function sigmoid(x) {
  return 1 / (1 + Math.exp(-x));
}

/** Return the normal distribution function of x, within 1e-7 (Abramowitz and Stegun 1964, formula 7.1.26). */
function normal(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x) * Math.SQRT1_2);
  const series = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t;
  const tail = 0.5 * series * Math.exp(-x * x / 2);
  return x < 0 ? tail : 1 - tail;
}
