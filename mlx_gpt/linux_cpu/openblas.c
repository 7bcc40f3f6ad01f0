// cblas_sgemm for MLX's CPU backend on Linux, compiled and loaded by openblas.py. Most calls are forwarded to OpenBLAS.
// OpenBLAS packs a matrix before it multiplies, and uses one core for a product with a vector. Decoding multiplies
// every weight matrix with a few rows, which is bound by memory bandwidth, so such products read w once, unpacked, on
// all of OpenBLAS's cores. OPENBLAS(name) is the name in NumPy's wheel, whose integers have 64 bits.

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
enum { MAX_ROWS = 40 };            // rows of x; with more, packing w is worth its cost
enum { MIN_FLOATS = 100000 };      // floats of w up to which OpenBLAS is as fast, without synchronization
enum { MIN_PRODUCTS = 1000000 };   // multiplications from which on OpenBLAS packs
enum { LONG = 1024, PART = 256 };  // terms of a sum that OpenBLAS adds in parts, and of a part
enum { ITEM_BYTES = 128 << 10 };   // bytes of w in a work item: they stay in the cache for the next rows of x
enum { MIN_ITEMS = 8 };            // work items that are worth the cost of waking another core
enum { SPINS = 50, YIELDS = 300 }; // spins between yields, and yields before a worker sleeps (0.1 ms or more)
enum { PREFETCH = 128 };           // floats of a row of w that are prefetched
enum { MAX_TERMS = 8192 };         // terms of a sum for which the buffer of packed rows of x has room

// Floats of a vector, and the number of rows of w in a tile with 1, 4 or WIDE rows of x: the sums fill the registers;
// with one row of x, several rows of w keep more memory requests in flight.
#if defined(__AVX512F__)
enum { LANES = 16, WIDE = 8, WITH_ONE = 6, WITH_FOUR = 4, WITH_WIDE = 3 };
#elif defined(__AVX__)
enum { LANES = 8, WIDE = 4, WITH_ONE = 6, WITH_FOUR = 3, WITH_WIDE = 3 };
#else
enum { LANES = 4, WIDE = 4, WITH_ONE = 6, WITH_FOUR = 3, WITH_WIDE = 3 };
#endif
enum { SUMS = 3 * WIDE }; // vectors, at most
enum { MULTIPLE = 12 };   // divisible by every number of rows of w in a tile
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float Four __attribute__((vector_size(16)));

// y = alpha x w^T + beta y: x (m, k), w (n, k), y (m, n); x_step, w_step and y_step are the row strides in floats.
typedef struct {
  int m, n, k, x_step, w_step, y_step;
  float alpha, beta;
  const float *x, *w;
  float *y;
  const float *packed; // with more than one row: x, the vectors that are multiplied with the same one of w adjacent
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

// Multiply M rows of x with N rows of w, ``apart`` rows from each other, with U independent sums per pair, to hide the
// latency of additions. Only m and n of them exist at the edges: the last is repeated there, and not written.
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
        __builtin_prefetch(w[j] + k + u * LANES + PREFETCH);
      }
#pragma GCC unroll 8
      for (int i = 0; i < M; i++) {
        Lanes one = *(const Lanes *)(x + (k + u * LANES) * M + i * LANES);
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) sums[(i * N + j) * U + u] += one * some[j];
      }
    }
  }
  for (; U > 1 && k <= p->k - LANES; k += LANES) // full vectors, fewer than U
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 8
      for (int j = 0; j < N; j++)
        sums[(i * N + j) * U] += *(const Lanes *)(x + k * M + i * LANES) * *(const Lanes *)(w[j] + k);
  Lanes totals[SUMS]; // a copy, so that sums stay in registers
#pragma GCC unroll 24
  for (int i = 0; i < M * N; i++) {
    totals[i] = sums[i * U];
#pragma GCC unroll 8
    for (int u = 1; u < U; u++) totals[i] += sums[i * U + u];
  }
  for (int i = 0; i < m; i++)
    for (int j = 0; j < n; j++) {
      float s = sum(totals[i * N + j]), *y = p->y + (int64_t)(row + i) * p->y_step + column + j * apart;
      for (int l = k; l < p->k; l++) s += p->x[(int64_t)(row + i) * p->x_step + l] * w[j][l];
      *y = p->alpha * s + (p->beta ? p->beta * *y : 0);
    }
}

// Compute the columns [first, last) of y. The rows of w in a tile are far from each other: several sequential streams
// of reads are faster than one.
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
  static _Thread_local float packed[MAX_ROWS * MAX_TERMS] __attribute__((aligned(64)));
  int M = rows_at_once(p);
  float *at = packed;
  for (int row = 0; row < p->m; row += M)
    for (int k = 0; k <= p->k - LANES; k += LANES)
      for (int i = row; i < row + M; i++, at += LANES)
        *(Lanes *)at = *(const Lanes *)(p->x + (int64_t)at_most(i, p->m - 1) * p->x_step + k);
  return packed;
}

// Worker threads. The caller publishes a product and computes its work items together with the workers that are awake;
// it waits only for items that a worker has begun, not for workers that sleep or whose core is in use.

static Product product;            // the published one
static int item_rows, n_workers;   // rows of w in a work item; threads besides the caller's
static _Atomic uint64_t remaining; // work items, and in the high 32 bits the product's number, against an ABA error
static _Atomic int done, wanted, sleeping; // work items; workers for this product; workers
static _Atomic int busy;                   // whether a product is published
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work_available = PTHREAD_COND_INITIALIZER;

static int run_item(void) {
  uint64_t seen = atomic_load(&remaining);
  do
    if (!(uint32_t)seen) return 0;
  while (!atomic_compare_exchange_weak(&remaining, &seen, seen - 1));
  int first = ((uint32_t)seen - 1) * item_rows;
  multiply(&product, first, at_most(product.n, first + item_rows));
  atomic_fetch_add(&done, 1);
  return 1;
}

static void spin(int n) {
  if (n % SPINS == 0) sched_yield();
#if defined(__x86_64__)
  else __builtin_ia32_pause();
#endif
}

static int has_work(int worker) { return (uint32_t)atomic_load(&remaining) && worker < atomic_load(&wanted); }

static void *run_worker(void *number) {
  int worker = (int)(intptr_t)number;
  for (;;) {
    for (int i = 1; i < SPINS * YIELDS; i++)
      if (has_work(worker) && run_item()) i = 0;
      else spin(i);
    pthread_mutex_lock(&mutex);
    atomic_fetch_add(&sleeping, 1);
    while (!has_work(worker)) pthread_cond_wait(&work_available, &mutex);
    atomic_fetch_sub(&sleeping, 1);
    pthread_mutex_unlock(&mutex);
  }
  return 0;
}

static void multiply_parallel(const Product *p) {
  static uint64_t number;
  int rows = ITEM_BYTES / (4 * p->k) / MULTIPLE * MULTIPLE + MULTIPLE, items = (p->n + rows - 1) / rows, idle = 0;
  int workers = OPENBLAS(openblas_get_num_threads)() - 1;
  if (workers < 1 || items < MIN_ITEMS || !atomic_compare_exchange_strong(&busy, &idle, 1)) {
    for (int first = 0; first < p->n; first += rows) multiply(p, first, at_most(p->n, first + rows));
    return;
  }
  for (pthread_t thread; n_workers < workers; n_workers++) {
    if (pthread_create(&thread, 0, run_worker, (void *)(intptr_t)n_workers)) break;
    pthread_detach(thread);
  }
  product = *p;
  item_rows = rows;
  atomic_store(&wanted, workers);
  atomic_store(&done, 0);
  atomic_store(&remaining, ++number << 32 | (uint32_t)items);
  if (atomic_load(&sleeping)) {
    pthread_mutex_lock(&mutex);
    pthread_cond_broadcast(&work_available);
    pthread_mutex_unlock(&mutex);
  }
  while (run_item());
  for (int i = 1; atomic_load(&done) < items; i++) spin(i);
  atomic_store(&busy, 0);
}

void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b,
                 int ldb, float beta, float *c, int ldc) {
  int few_rows = order == ROW_MAJOR && ta == NO_TRANS && m <= MAX_ROWS && k > 0;
  if (few_rows && tb == TRANS && (int64_t)n * k > MIN_FLOATS && (m == 1 || k <= MAX_TERMS)) {
    Product p = {m, n, k, lda, ldb, ldc, alpha, beta, a, b, c, 0};
    if (m > 1) p.packed = pack(&p);
    multiply_parallel(&p);
  } else if (few_rows && m == 1 && (int64_t)n * k > MIN_PRODUCTS)
    OPENBLAS(cblas_sgemv)(order, TRANS, k, n, alpha, b, ldb, a, 1, beta, c, 1);
  else if (order == ROW_MAJOR && k >= LONG && ta == NO_TRANS && tb == TRANS)
    // Add long sums in parts: otherwise every term is rounded at the magnitude of the whole sum.
    for (int at = 0; at < k; at += PART)
      OPENBLAS(cblas_sgemm)(order, ta, tb, m, n, at_most(k - at, PART), alpha, a + at, lda, b + at, ldb, at ? 1 : beta,
                            c, ldc);
  else
    OPENBLAS(cblas_sgemm)(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
