// What MLX's CPU backend calls on Linux for a product of float32 matrices, as blas.py lends it. Most go on to OpenBLAS.
// But OpenBLAS copies a matrix before it multiplies, and with a vector it uses one core; decoding multiplies every
// matrix with a few rows, and takes as long as it takes to read the matrices. So with few rows a matrix is read once,
// where it lies, by all cores that OpenBLAS may use.
//
// OPENBLAS(name), from blas.py, is OpenBLAS's function in NumPy's wheel, which has other names and 64-bit integers.

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

void OPENBLAS(cblas_sgemm)(int, int, int, int64_t, int64_t, int64_t, float, const float *, int64_t, const float *,
                           int64_t, float, float *, int64_t);
void OPENBLAS(cblas_sgemv)(int, int, int64_t, int64_t, float, const float *, int64_t, const float *, int64_t, float,
                           float *, int64_t);
int OPENBLAS(openblas_get_num_threads)(void);

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };
enum { FEW = 40 };                // rows of x; with more, it pays to copy w for the sake of computing
enum { SMALL = 100000 };          // floats of w up to which OpenBLAS is as fast, and waits for nobody
enum { LARGE = 1000000 };         // multiplications from which on OpenBLAS copies
enum { LONG = 1024, PART = 256 }; // terms of a sum that OpenBLAS is to add in parts, and of a part
enum { SHARE = 128 << 10 };       // bytes of w that a core takes at a time: its cache holds them for the next rows of x
enum { MANY = 8 };                // shares that are worth another core: to call it takes as long as to read some
enum { SPINS = 50, LOOKS = 300 }; // how long a core waits for more before it sleeps: some tenths of a millisecond
enum { AHEAD = 128 };             // floats of a row of w that are on the way from the memory before they are needed
enum { LONGEST = 8192 };          // terms of a sum for which there is room where rows of x are put side by side

// Floats of a vector, and how many rows of w are multiplied at once with how many of x: with 1, with 4, with WIDE. The
// registers hold the sums; with one row of x it is the memory that wants to be asked for several rows of w.
#if defined(__AVX512F__)
enum { LANES = 16, WIDE = 8, WITH_ONE = 6, WITH_FOUR = 4, WITH_WIDE = 3 };
#elif defined(__AVX__)
enum { LANES = 8, WIDE = 4, WITH_ONE = 6, WITH_FOUR = 3, WITH_WIDE = 3 };
#else
enum { LANES = 4, WIDE = 4, WITH_ONE = 6, WITH_FOUR = 3, WITH_WIDE = 3 };
#endif
enum { SUMS = 3 * WIDE }; // vectors, at most
enum { EACH = 12 };       // rows of w that can be cut into any of these numbers
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float Four __attribute__((vector_size(16)));

// y = alpha x w^T + beta y: x (m, k), w (n, k), y (m, n); each row begins so many floats after the one before.
typedef struct {
  int m, n, k, x_step, w_step, y_step;
  float alpha, beta;
  const float *x, *w;
  float *y;
  const float *packed; // if there is more than one row: x, with the vectors that meet the same one of w side by side
} Product;

static inline int at_most(int n, int limit) { return n < limit ? n : limit; }

static inline int rows_at_once(const Product *p) { return p->m == 1 ? 1 : p->m <= 4 ? 4 : WIDE; }

static inline float sum(Lanes v) {
  Four s[LANES / 4];
  __builtin_memcpy(s, &v, sizeof s);
  for (int half = LANES / 8; half; half /= 2)
    for (int i = 0; i < half; i++) s[i] += s[i + half];
  return (s[0][0] + s[0][2]) + (s[0][1] + s[0][3]);
}

// M rows of x with N rows of w that are ``apart``, each pair with U sums, so that an addition need not wait for the one
// before. Where only m and n of them are there, the last stands for the rest, and nothing is written.
static inline __attribute__((always_inline)) void tile(const Product *p, int row, int column, int m, int n, int apart,
                                                       const int M, const int N, const int U) {
  const float *x = M > 1 ? p->packed + (int64_t)row * (p->k / LANES * LANES) : p->x, *w[WITH_ONE];
  Lanes sums[SUMS];
  int k = 0;
#pragma GCC unroll 24
  for (int i = 0; i < M * N * U; i++) sums[i] = (Lanes){0};
  for (int j = 0; j < N; j++) w[j] = p->w + (int64_t)(column + (j < n ? j : n - 1) * apart) * p->w_step;
  for (; k <= p->k - U * LANES; k += U * LANES) {
#pragma GCC unroll 8
    for (int u = 0; u < U; u++) {
      Lanes some[WITH_ONE];
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) {
        some[j] = *(const Lanes *)(w[j] + k + u * LANES);
        __builtin_prefetch(w[j] + k + u * LANES + AHEAD);
      }
#pragma GCC unroll 8
      for (int i = 0; i < M; i++) {
        Lanes one = *(const Lanes *)(x + (k + u * LANES) * M + i * LANES);
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) sums[(i * N + j) * U + u] += one * some[j];
      }
    }
  }
  for (; U > 1 && k <= p->k - LANES; k += LANES) // what fills a vector, but not U of them
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 8
      for (int j = 0; j < N; j++)
        sums[(i * N + j) * U] += *(const Lanes *)(x + k * M + i * LANES) * *(const Lanes *)(w[j] + k);
  Lanes found[SUMS]; // out of the registers
#pragma GCC unroll 24
  for (int i = 0; i < M * N; i++) {
    found[i] = sums[i * U];
#pragma GCC unroll 8
    for (int u = 1; u < U; u++) found[i] += sums[i * U + u];
  }
  for (int i = 0; i < m; i++)
    for (int j = 0; j < n; j++) {
      float s = sum(found[i * N + j]), *y = p->y + (int64_t)(row + i) * p->y_step + column + j * apart;
      for (int l = k; l < p->k; l++) s += p->x[(int64_t)(row + i) * p->x_step + l] * w[j][l];
      *y = p->alpha * s + (p->beta ? p->beta * *y : 0);
    }
}

// The columns of y from first up to last. Rows of w that are multiplied at once lie far from each other: as many streams
// of numbers, each from one place to the next, come faster than one.
static void multiply(const Product *p, int first, int last) {
  int M = rows_at_once(p), N = M == 1 ? WITH_ONE : M == 4 ? WITH_FOUR : WITH_WIDE;
  int apart = (last - first + N - 1) / N;
  for (int row = 0; row < p->m; row += M)
    for (int column = first; column < first + apart; column++) {
      int m = at_most(p->m - row, M), n = (last - column + apart - 1) / apart;
      if (M == 1) tile(p, row, column, m, n, apart, 1, WITH_ONE, 2);
      else if (M == 4) tile(p, row, column, m, n, apart, 4, WITH_FOUR, 1);
      else tile(p, row, column, m, n, apart, WIDE, WITH_WIDE, 1);
    }
}

static const float *pack(const Product *p) {
  static _Thread_local float packed[FEW * LONGEST] __attribute__((aligned(64)));
  int M = rows_at_once(p);
  float *at = packed;
  for (int row = 0; row < p->m; row += M)
    for (int k = 0; k <= p->k - LANES; k += LANES)
      for (int i = row; i < row + M; i++, at += LANES)
        *(Lanes *)at = *(const Lanes *)(p->x + (int64_t)at_most(i, p->m - 1) * p->x_step + k);
  return packed;
}

// The cores. Who has a product puts it up and takes shares of it until all are taken, and so does every helper that is
// awake. Nobody waits for a helper that has taken none: it may be asleep, or its core at work for somebody else.

static Product product;          // the one that is up
static int rows_each, helpers;   // rows of w in a share; threads besides the caller's
static _Atomic uint64_t untaken; // shares, above them, in 32 bits, the product's number, so that none is taken for another
static _Atomic int done, wanted, sleeping, busy; // shares; helpers for this product; helpers; whether a product is up
static pthread_mutex_t bed = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;

static int take_a_share(void) {
  uint64_t seen = atomic_load(&untaken);
  do
    if (!(uint32_t)seen) return 0;
  while (!atomic_compare_exchange_weak(&untaken, &seen, seen - 1));
  int first = ((uint32_t)seen - 1) * rows_each;
  multiply(&product, first, at_most(product.n, first + rows_each));
  atomic_fetch_add(&done, 1);
  return 1;
}

static void wait_a_moment(int n) {
  if (n % SPINS == 0) sched_yield();
#if defined(__x86_64__)
  else __builtin_ia32_pause();
#endif
}

static int needs(int helper) { return (uint32_t)atomic_load(&untaken) && helper < atomic_load(&wanted); }

static void *help(void *number) {
  int me = (int)(intptr_t)number;
  for (;;) {
    for (int i = 1; i < SPINS * LOOKS; i++)
      if (needs(me) && take_a_share()) i = 0;
      else wait_a_moment(i);
    pthread_mutex_lock(&bed);
    atomic_fetch_add(&sleeping, 1);
    while (!needs(me)) pthread_cond_wait(&wake, &bed);
    atomic_fetch_sub(&sleeping, 1);
    pthread_mutex_unlock(&bed);
  }
  return 0;
}

static void multiply_together(const Product *p) {
  static uint64_t number;
  int rows = SHARE / (4 * p->k) / EACH * EACH + EACH, shares = (p->n + rows - 1) / rows, nobody = 0;
  int others = OPENBLAS(openblas_get_num_threads)() - 1;
  if (others < 1 || shares < MANY || !atomic_compare_exchange_strong(&busy, &nobody, 1)) {
    for (int first = 0; first < p->n; first += rows) multiply(p, first, at_most(p->n, first + rows));
    return;
  }
  for (pthread_t thread; helpers < others && !pthread_create(&thread, 0, help, (void *)(intptr_t)helpers); helpers++)
    pthread_detach(thread);
  product = *p;
  rows_each = rows;
  atomic_store(&wanted, others);
  atomic_store(&done, 0);
  atomic_store(&untaken, ++number << 32 | (uint32_t)shares);
  if (atomic_load(&sleeping)) {
    pthread_mutex_lock(&bed);
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&bed);
  }
  while (take_a_share());
  for (int i = 1; atomic_load(&done) < shares; i++) wait_a_moment(i);
  atomic_store(&busy, 0);
}

void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b,
                 int ldb, float beta, float *c, int ldc) {
  int few = order == ROW_MAJOR && ta == NO_TRANS && m <= FEW && k > 0;
  if (few && tb == TRANS && (int64_t)n * k > SMALL && (m == 1 || k <= LONGEST)) {
    Product p = {m, n, k, lda, ldb, ldc, alpha, beta, a, b, c, 0};
    if (m > 1) p.packed = pack(&p);
    multiply_together(&p);
  } else if (few && m == 1 && (int64_t)n * k > LARGE)
    OPENBLAS(cblas_sgemv)(order, TRANS, k, n, alpha, b, ldb, a, 1, beta, c, 1);
  else if (order == ROW_MAJOR && k >= LONG && ta == NO_TRANS && tb == TRANS)
    // A layer with long rows, x W^T: in parts, or the last terms of a row are rounded as the whole sum is.
    for (int at = 0; at < k; at += PART)
      OPENBLAS(cblas_sgemm)(order, ta, tb, m, n, at_most(k - at, PART), alpha, a + at, lda, b + at, ldb, at ? 1 : beta,
                            c, ldc);
  else
    OPENBLAS(cblas_sgemm)(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
