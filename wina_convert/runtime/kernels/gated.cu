// Gated products of one or two rows on an NVIDIA GPU, one launch for up to three matrices that read the same x:
//
//   y[r] = bias + sum of x[r, j] * weight_t[j, :] over the inputs j with not |x[r, j]| <= tau[j]
//
// The time goes into reading weight_t, so only the rows of inputs that are kept are read, in 16-byte loads, eight of them in
// flight for every thread. A block owns a tile of columns, LANES * 16 bytes wide, and, where the inputs are split, every
// splits-th chunk of eight inputs: dealing them in turn balances masks whose kept inputs are neighbours. It
//   1. lists the kept inputs of its share in shared memory, ascending;
//   2. multiplies: each warp takes entries of the list in turn, LANES lanes to a row of weight_t, and sums in float32;
//   3. adds the lanes, then the warps, then, in the last block of a tile to arrive, the splits.
// From compute capability 9.0 on its blocks may be on their multiprocessors before the kernel before it has ended. They wait
// there, and what they read afterwards comes from the second cache: the first may hold what that memory was before.
// Every sum has a fixed order. The counter of arrivals decides which block adds the splits, never in which order.
//
// No headers, so that NVRTC needs no toolkit. Macros: TYPE of x, weight_t, bias and y (0 bfloat16, 1 float16, 2 float32),
// ROWS (1 or 2), LANES (4, 8, 16 or 32), ALIGNED (1: every row starts at a multiple of 16 bytes and n_in is a multiple of 8;
// 0: any sizes, any addresses, slower). Needs compute capability 8.0. The host's side of it is cuda.py.

#define WARPS 16  // of a block; two blocks fit on a multiprocessor, so a thread has 64 registers
#define THREADS (WARPS * 32)
#define LOADS 8             // in flight for each thread
#define GROUPS (32 / LANES)  // rows of weight_t that a warp reads at once

#if TYPE == 2
typedef float T;
#define WIDTH 4  // elements of 16 bytes
#else
typedef unsigned short T;
#define WIDTH 8
#endif
#define TILE (LANES * WIDTH)  // columns of a block
#define SHARE ((TILE + THREADS - 1) / THREADS)

struct Matrix {
  const T* weight_t;  // [n_in, n_out]
  const float* tau;   // [n_in]
  const T* bias;      // [n_out] or null
  int n_out, first;   // first: number of its first tile
};

struct Arguments {  // first what is the same in each call, then what is not
  Matrix matrix[3];
  int matrices, n_in, splits, tiles;
  const T* x;          // [ROWS, n_in]
  float* partial;      // [ROWS, splits, tiles * TILE], where splits > 1
  unsigned* arrivals;  // [tiles], zero before and after a launch
  T* y[3];             // [ROWS, n_out] each
};

__device__ __forceinline__ float widen(T value) {
#if TYPE == 0
  return __uint_as_float((unsigned)value << 16);
#elif TYPE == 1
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
  return wide;
#else
  return value;
#endif
}

__device__ __forceinline__ T narrow(float value) {  // to nearest even
#if TYPE == 2
  return value;
#else
  T half;
#if TYPE == 0
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(value));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
#endif
  return half;
#endif
}

__device__ __forceinline__ void widen(const uint4& packed, float* wide) {
  const unsigned word[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#if TYPE == 2
    wide[i] = __uint_as_float(word[i]);
#elif TYPE == 1
    wide[2 * i] = widen((T)(word[i] & 0xffff));
    wide[2 * i + 1] = widen((T)(word[i] >> 16));
#else
    wide[2 * i] = __uint_as_float(word[i] << 16);
    wide[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
#endif
  }
}

// Eight neighbours in float32; only the first `valid` are read where that can be fewer.
__device__ __forceinline__ void eight(const T* from, int valid, float* wide) {
#if ALIGNED
  widen(__ldcg((const uint4*)from), wide);
#if TYPE == 2
  widen(__ldcg((const uint4*)from + 1), wide + 4);
#endif
#else
#pragma unroll
  for (int i = 0; i < 8; ++i) wide[i] = i < valid ? widen(__ldcg(from + i)) : 0.f;
#endif
}

__device__ __forceinline__ void eight_limits(const float* from, int valid, float* limit) {
#if ALIGNED
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const float4 four = __ldcg((const float4*)(from + i));
    limit[i] = four.x, limit[i + 1] = four.y, limit[i + 2] = four.z, limit[i + 3] = four.w;
  }
#else
#pragma unroll
  for (int i = 0; i < 8; ++i) limit[i] = i < valid ? __ldcg(from + i) : 0.f;
#endif
}

// 16 bytes of a weight, which nobody reads again before the next token.
__device__ __forceinline__ uint4 stream(const T* from, int valid, unsigned long long policy) {
#if ALIGNED
  uint4 packed;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(packed.x), "=r"(packed.y), "=r"(packed.z), "=r"(packed.w)
               : "l"(from), "l"(policy));
  return packed;
#else
  unsigned word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#if TYPE == 2
    word[i] = i < valid ? __float_as_uint(__ldcg(from + i)) : 0u;
#else
    const unsigned low = 2 * i < valid ? __ldcg(from + 2 * i) : 0u, high = 2 * i + 1 < valid ? __ldcg(from + 2 * i + 1) : 0u;
    word[i] = low | high << 16;
#endif
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
#endif
}

// The inclusive sum over the lanes up to this one.
__device__ __forceinline__ int scan(int value, int lane) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_up_sync(~0u, value, distance);
    if (lane >= distance) value += before;
  }
  return value;
}

#if ROWS == 1
#define ENTRY(input, row0, row1) (input)
#define INPUT(entry) (entry)
#else  // which of the two rows keep the input, in the lowest bits
#define ENTRY(input, row0, row1) ((input) << 2 | (row1) << 1 | (row0))
#define INPUT(entry) ((entry) >> 2)
#endif

// Lists what is kept of split k, whose chunks are k, k + splits, ...: the inputs in `entries`, their x in `values` [., ROWS].
// Returns how many; all threads may read the list then.
__device__ __forceinline__ int list(const Arguments& a, const float* tau, int k, int chunks, int* entries, float* values) {
  __shared__ int kept_by_warp[WARPS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int listed = 0;
  for (int first = 0; first < chunks; first += THREADS) {
    const int chunk = first + threadIdx.x, input = (chunk * a.splits + k) * 8;
    float x[ROWS][8];
    unsigned keep[2] = {0, 0};  // a bit for each of the eight inputs, by row
    if (chunk < chunks) {
      const int valid = min(8, a.n_in - input);
      float limit[8];
      eight_limits(tau + input, valid, limit);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        eight(a.x + (size_t)r * a.n_in + input, valid, x[r]);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (!(fabsf(x[r][i]) <= limit[i]) && (ALIGNED || i < valid)) keep[r] |= 1u << i;  // a NaN is kept
      }
    }
    const unsigned either = keep[0] | keep[1];
    const int count = __popc(either), upto = scan(count, lane);
    if (lane == 31) kept_by_warp[warp] = upto;
    __syncthreads();
    const int of_warp = lane < WARPS ? kept_by_warp[lane] : 0, upto_warp = scan(of_warp, lane);
    int at = listed + __shfl_sync(~0u, upto_warp - of_warp, warp) + upto - count;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (either >> i & 1) {
        entries[at] = ENTRY(input + i, keep[0] >> i & 1, keep[1] >> i & 1);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) values[at * ROWS + r] = x[r][i];
        ++at;
      }
    listed += __shfl_sync(~0u, upto_warp, 31);
    __syncthreads();
  }
  return listed;
}

// Adds this thread's share of the list to its sums: entries in turn with the other groups of lanes, WIDTH columns.
__device__ __forceinline__ void multiply(const T* column, int n_out, int valid, const int* entries, const float* values,
                                         int listed, float (&sum)[ROWS][WIDTH]) {
  const int group = threadIdx.x / LANES, groups = WARPS * GROUPS;  // of the block
  unsigned long long policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  for (int first = group; first < listed; first += groups * LOADS) {
    uint4 packed[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {  // beyond the list no weight is read: it may be infinite, and 0 * infinity is no zero
      const int e = first + i * groups;
      packed[i] = make_uint4(0, 0, 0, 0);
      if (e < listed && valid > 0) packed[i] = stream(column + (size_t)INPUT(entries[e]) * n_out, valid, policy);
    }
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      const int e = first + i * groups;
      float weight[WIDTH];
      widen(packed[i], weight);
#if ROWS == 1
      const float x = e < listed ? values[e] : 0.f;
#pragma unroll
      for (int c = 0; c < WIDTH; ++c) sum[0][c] = fmaf(x, weight[c], sum[0][c]);
#else
      const int keep = e < listed ? entries[e] : 0;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const float x = e < listed ? values[e * ROWS + r] : 0.f;
#pragma unroll
        for (int c = 0; c < WIDTH; ++c) sum[r][c] = keep >> r & 1 ? fmaf(x, weight[c], sum[r][c]) : sum[r][c];
      }
#endif
    }
  }
}

// The sums of all groups of lanes for one row: thread t gets column t of the tile (and t + THREADS, ...).
__device__ __forceinline__ void add_groups(float (&sum)[WIDTH], float* sums, float (&total)[SHARE]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int distance = LANES; distance < 32; distance *= 2)
#pragma unroll
    for (int c = 0; c < WIDTH; ++c) sum[c] += __shfl_xor_sync(~0u, sum[c], distance);
  if (lane < LANES) {
#pragma unroll
    for (int c = 0; c < WIDTH; c += 4)
      *(float4*)(sums + warp * TILE + lane * WIDTH + c) = make_float4(sum[c], sum[c + 1], sum[c + 2], sum[c + 3]);
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < SHARE; ++s) {
    const int c = s * THREADS + threadIdx.x;
    total[s] = 0.f;
    if (c < TILE) {
#pragma unroll
      for (int w = 0; w < WARPS; ++w) total[s] += sums[w * TILE + c];
    }
  }
}

// Leaves this block's totals in memory; true in the last block of the tile to come, where they become the sum of all splits.
__device__ __forceinline__ bool add_splits(const Arguments& a, int tile, int k, float (&total)[ROWS][SHARE]) {
  __shared__ unsigned before;
  const size_t width = (size_t)a.tiles * TILE;
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int s = 0; s < SHARE; ++s) {
      const int c = s * THREADS + threadIdx.x;
      if (c < TILE) __stcg(a.partial + ((size_t)r * a.splits + k) * width + (size_t)tile * TILE + c, total[r][s]);
    }
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned* arrivals = a.arrivals + tile;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(arrivals) : "memory");
    if (before == a.splits - 1) *arrivals = 0;  // for the next launch
  }
  __syncthreads();
  if (before != a.splits - 1) return false;
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int s = 0; s < SHARE; ++s) {
      const int c = s * THREADS + threadIdx.x;
      total[r][s] = 0.f;
      if (c < TILE) {
        const float* from = a.partial + (size_t)r * a.splits * width + (size_t)tile * TILE + c;
#pragma unroll 8
        for (int split = 0; split < a.splits; ++split) total[r][s] += __ldcg(from + split * width);
      }
    }
  return true;
}

// Grid: (tiles of all matrices, splits). Dynamic shared memory: sums [WARPS, TILE], values [8 * chunks of a split, ROWS] and as
// many entries.
extern "C" __global__ void __launch_bounds__(THREADS, 2) gated(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(16) float sums[];
  const int tile = blockIdx.x, k = blockIdx.y;
  const int chunks = ((a.n_in + 7) / 8 + a.splits - 1) / a.splits;  // of the first split; a later one may have one less
  const int mine = ((a.n_in + 7) / 8 - k + a.splits - 1) / a.splits;
  float* values = sums + WARPS * TILE;
  int* entries = (int*)(values + chunks * 8 * ROWS);
  const int which = (a.matrices > 1 && tile >= a.matrix[1].first) + (a.matrices > 2 && tile >= a.matrix[2].first);
  const Matrix m = a.matrix[which];
  T* const y = a.y[which];
  const int left = (tile - m.first) * TILE, column = left + threadIdx.x % LANES * WIDTH;

#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");               // for the kernel before and all that it wrote
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");  // once all blocks are here the next kernel may come
#endif
  const int listed = list(a, m.tau, k, mine, entries, values);
  float sum[ROWS][WIDTH] = {};
  multiply(m.weight_t + column, m.n_out, m.n_out - column, entries, values, listed, sum);

  float total[ROWS][SHARE];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (r) __syncthreads();  // the sums of the row before have been read
    add_groups(sum[r], sums, total[r]);
  }
  if (a.splits > 1 && !add_splits(a, tile, k, total)) return;
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int s = 0; s < SHARE; ++s) {
      const int c = s * THREADS + threadIdx.x, out = left + c;
      if (c < TILE && out < m.n_out)
        y[(size_t)r * m.n_out + out] = narrow(m.bias ? total[r][s] + widen(__ldcg(m.bias + out)) : total[r][s]);
    }
}
