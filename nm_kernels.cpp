// CPU kernels of rnm_td3_continuous.py: products that skip the zeros of N:M sparse layers, float32.
//
// operator           agrees with
// layout             nothing: what the kernels make of the index of a layer, see `struct Layer`
// mlp, mlp_backward  NMLinear.forward of layers with ReLU between them, and autograd through it
// polyak             NMLinear.polyak_
// project            NMLinear.project and nm_mask
// adam               torch.optim.Adam.step, fused
// act                Actor.act
// critic_gradients   TD3.update_critics up to the step of Adam
// actor_gradients    TD3.update_actor up to the step of Adam
//
// Lanes are samples: a tile of samples lies feature-major, so that an active weight is one scalar times a few
// contiguous vectors. That skips the zeros of any pattern and size without gathers, and serves W~ and its transpose
// alike.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
using at::Tensor, at::TensorList, std::min, std::max;

#if defined(__AVX512F__)
constexpr int V = 16;  // lanes of a vector
#elif defined(__AVX2__)
constexpr int V = 8;
#else
constexpr int V = 4;
#endif
constexpr int T = 8, TILE = T * V;  // one feature of a tile is 8 vectors: 8 sums hide the latency of a multiply-add
constexpr int BLOCK = 8192 / TILE;  // features of a tile that fill a first-level cache of 32 KB
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))
typedef float vec __attribute__((vector_size(4 * V), aligned(4), may_alias));
typedef int ivec __attribute__((vector_size(4 * V), aligned(4), may_alias));
typedef uint16_t lanes __attribute__((vector_size(2 * V), aligned(2), may_alias));
INLINE vec load(const float* p) { return *(const vec*)p; }
INLINE void store(float* p, vec v) { *(vec*)p = v; }

// Of V vectors in registers, swap the off-diagonal H x H blocks, then those of half the size, and so on: a transpose.
// Or add the halves instead: in the end, lane i of r[0] is the sum over the lanes of r[i].
template <bool ADD, int H, int... K>
INLINE void swap_blocks(vec* r, std::integer_sequence<int, K...> k) {
  const ivec low = {(K & H ? V + K - H : K)...}, high = {(K & H ? V + K : K + H)...};
  UNROLL
  for (int i = 0; i < (ADD ? H : V); i++)
    if (!(i & H)) {
      const vec a = __builtin_shuffle(r[i], r[i + H], low), b = __builtin_shuffle(r[i], r[i + H], high);
      r[i] = ADD ? a + b : a;
      if (!ADD) r[i + H] = b;
    }
  if constexpr (H > 1) swap_blocks<ADD, H / 2>(r, k);
}
INLINE void transpose(vec* r) { swap_blocks<false, V / 2>(r, std::make_integer_sequence<int, V>()); }
INLINE void add_lanes(vec* r) { swap_blocks<true, V / 2>(r, std::make_integer_sequence<int, V>()); }

// A tile of x (batch-major, rows of C) to [C][TILE] (IN), or back. Samples that x lacks are zeros in the tile.
template <bool IN, bool WHOLE>
INLINE void turn_block(float* x, int64_t C, float* tile, int samples, int features) {
  const int S = WHOLE ? V : samples, F = WHOLE ? V : features;
  vec r[V] = {};
  if (IN) {
    UNROLL
    for (int i = 0; i < S; i++) memcpy(&r[i], x + i * C, 4 * F);
    transpose(r);
    UNROLL
    for (int i = 0; i < F; i++) store(tile + i * TILE, r[i]);
  } else {
    UNROLL
    for (int i = 0; i < F; i++) r[i] = load(tile + i * TILE);
    transpose(r);
    UNROLL
    for (int i = 0; i < S; i++) memcpy(x + i * C, &r[i], 4 * F);
  }
}
template <bool IN>
static void turn(const float* x, int64_t samples, int64_t C, float* tile) {
  for (int64_t c = 0; c < C; c += V)
    for (int64_t s = 0; s < TILE; s += V) {
      float *from = (float*)x + s * C + c, *to = tile + c * TILE + s;
      const int S = max<int64_t>(0, min<int64_t>(V, samples - s)), F = min<int64_t>(V, C - c);
      if (S == V && F == V) turn_block<IN, true>(from, C, to, S, F);
      else turn_block<IN, false>(from, C, to, S, F);
    }
}

// One layer. What its mask compiles to stands in one int tensor, `layout`:
//   range, column    W~: the values [begin, end) of each row by block of columns, [blocks][R][2]; their columns, [R][A]
//   t_range, row     its transpose: the like ranges [t_blocks][C][2]; the row of each value, column by column
//   place            where in the transpose each value of W~ stands, [R][A]
//   lane             column % V of V rows side by side, [R / V][A][V]; of use if the rows are regular: if value j of
//                    every row lies among the same V columns, as it does when M divides V
struct Layer {
  int64_t R, A, C, blocks, t_blocks, size;
  int *irregular, *range, *t_range, *place;
  uint16_t *column, *row;
  lanes* lane;
  Tensor values, bias;
  const float *v, *b = nullptr;
  Layer(int64_t R, int64_t A, int64_t C, int* p) : R(R), A(A), C(C), irregular(p), range(p + 1) {
    blocks = (C + BLOCK - 1) / BLOCK, t_blocks = (R + BLOCK - 1) / BLOCK;
    t_range = range + 2 * blocks * R, place = t_range + 2 * t_blocks * C;
    column = (uint16_t*)(place + R * A), row = column + R * A, lane = (lanes*)(row + R * A);
    size = place + 2 * R * A + (R + V - 1) / V * V / 2 * A - p;
  }
  Layer(int64_t C, const Tensor& values_, const Tensor& bias_, const Tensor& layout)
      : Layer(values_.size(0), values_.size(1), C, layout.data_ptr<int>()) {
    TORCH_CHECK(R > 0 && A > 0 && C > 0, "a layer has at least one weight");
    TORCH_CHECK(size == layout.numel(), "x or values do not fit the layout");
    TORCH_CHECK(bias_.numel() == R || bias_.numel() == 0, "the bias needs a number for each row, or none at all");
    values = values_.contiguous(), bias = bias_.contiguous(), v = values.data_ptr<float>();
    if (bias.numel()) b = bias.data_ptr<float>();
  }
};
static void write_layout(const Layer& l, const int64_t* id) {
  const int64_t R = l.R, A = l.A;
  memset(l.irregular, 0, 4 * l.size);
  for (int64_t r = 0; r < R; r++)
    for (int64_t b = 0, j = 0; b < l.blocks; b++) {
      l.range[2 * (b * R + r)] = r * A + j;
      for (const int64_t* row = id + r * A; j < A && row[j] < (b + 1) * BLOCK; j++) {
        l.column[r * A + j] = row[j];
        l.t_range[2 * (r / BLOCK * l.C + row[j]) + 1]++;  // at first the number of values,
        *l.irregular |= row[j] / V != id[j] / V;
      }
      l.range[2 * (b * R + r) + 1] = r * A + j;
    }
  for (int64_t i = 0, begin = 0; i < l.t_blocks * l.C; i++) {  // then where they begin,
    const int count = l.t_range[2 * i + 1];
    l.t_range[2 * i] = l.t_range[2 * i + 1] = begin;
    begin += count;
  }
  for (int64_t r = 0; r < R; r++)
    for (int64_t j = 0; j < A; j++) {
      const int64_t column = l.column[r * A + j];
      const int end = l.t_range[2 * (r / BLOCK * l.C + column) + 1]++;  // and last where they end
      l.row[end] = r, l.place[r * A + j] = end, l.lane[r / V * A + j][r % V] = column % V;
    }
}
Tensor layout(const Tensor& index_, int64_t columns) {
  TORCH_CHECK(index_.is_cpu(), "the native backend is for the CPU");
  const Tensor index = index_.contiguous();
  const int64_t R = index.size(0), A = index.size(1), *id = index.data_ptr<int64_t>();
  TORCH_CHECK(max(R, columns) <= 65536 && R * A <= INT_MAX / 4, "native layers have up to 65536 neurons");
  for (int64_t j = 0; j < R * A; j++)
    TORCH_CHECK(id[j] >= 0 && id[j] < columns && (j % A == 0 || id[j - 1] < id[j]),
                "the columns of a row have to ascend and to lie in 0 to ", columns - 1);
  Tensor out = at::empty({Layer(R, A, columns, nullptr).size}, at::kInt);
  write_layout(Layer(R, A, columns, out.data_ptr<int>()), id);
  return out;
}

// A tile of Y = X W~^T + b, and of dX = G W~ with the transpose: out[r] = bias[r] + sum of v[j] in[index[j]] over the
// ranges of r. Then a ReLU, or its gradient: zero where the gate is.
static void product(const float* v, const uint16_t* index, const int* range, int64_t blocks, int64_t rows,
                    const float* in, float* out, const float* bias, bool relu, const float* gate) {
  for (int64_t block = 0; block < blocks; block++)
    for (int64_t r = 0; r < rows; r++, range += 2) {
      for (int j = range[2]; j < range[2] + range[1] - range[0]; j += 16)  // of the next row
        __builtin_prefetch(v + j), __builtin_prefetch(index + j);
      vec sum[T];
      UNROLL
      for (int k = 0; k < T; k++) sum[k] = block ? load(out + r * TILE + k * V) : vec{} + (bias ? bias[r] : 0);
      for (int j = range[0]; j < range[1]; j++) {
        const float* x = in + index[j] * TILE;
        UNROLL
        for (int k = 0; k < T; k++) sum[k] += v[j] * load(x + k * V);
      }
      const bool last = block == blocks - 1;
      if (last && relu) UNROLL
      for (int k = 0; k < T; k++) sum[k] = sum[k] < 0.f ? vec{} : sum[k];
      if (last && gate) UNROLL
      for (int k = 0; k < T; k++) sum[k] = load(gate + r * TILE + k * V) <= 0.f ? vec{} : sum[k];
      UNROLL
      for (int k = 0; k < T; k++) store(out + r * TILE + k * V, sum[k]);
    }
}

// dW~ at the active entries: dot products of a row of G^T with rows of X^T, V values of a row of W~ at once, a group of
// tiles after the other, so that the rows of X^T stay in the cache from one row of W~ to the next. And db.
static void weight_gradient(const Layer& l, const float* g, int64_t g_stride, const float* x, int64_t x_stride,
                            int64_t tiles, int64_t first, int64_t last, float* dv, float* db) {
  const int64_t group = max<int64_t>(2, BLOCK * l.A / (V * l.C));
  for (int64_t t0 = 0; t0 < tiles; t0 += group)
    for (int64_t j = 0; j < l.A; j += V)
      for (int64_t r = first; r < last; r++) {
        const int n = min<int64_t>(V, l.A - j);
        const float* xj[V];
        vec sum[V] = {}, gr[T];
        UNROLL
        for (int i = 0; i < V; i++) xj[i] = x + t0 * x_stride + l.column[r * l.A + j + min(i, n - 1)] * TILE;
        for (int64_t t = t0; t < min(tiles, t0 + group); t++) {
          UNROLL
          for (int k = 0; k < T; k++) gr[k] = load(g + t * g_stride + r * TILE + k * V);
          UNROLL
          for (int i = 0; i < V; i++) {
            UNROLL
            for (int k = 0; k < T; k++) sum[i] += gr[k] * load(xj[i] + k * V);
            xj[i] += x_stride;
          }
        }
        add_lanes(sum);
        float* d = dv + r * l.A + j;
        if (n == V) store(d, load(d) + sum[0]);
        else
          for (int i = 0; i < n; i++) d[i] += sum[0][i];
      }
  for (int64_t r = first; l.b && r < last; r++) {
    vec sum[V] = {};
    for (int64_t t = 0; t < tiles; t++)
      for (int k = 0; k < T; k++) sum[0] += load(g + t * g_stride + r * TILE + k * V);
    add_lanes(sum);
    db[r] = sum[0][0];
  }
}

// One sample, groups of V rows: lanes are rows, and x is picked from a register, if the rows are regular.
static void rows_of_sample(const Layer& l, const float* x, float* y, int64_t first, int64_t last, bool relu) {
  for (int64_t group = first; group < last; group++) {
    const int n = min<int64_t>(V, l.R - group * V);
    int64_t at[V], j = 0;
    vec sum, w[V];
    UNROLL
    for (int i = 0; i < V; i++) {
      const int64_t r = group * V + min(i, n - 1);
      at[i] = r * l.A, sum[i] = l.b ? l.b[r] : 0;
    }
    for (; j + V <= l.A && !*l.irregular; j += V) {
      UNROLL
      for (int i = 0; i < V; i++) w[i] = load(l.v + at[i] + j);
      transpose(w);
      UNROLL
      for (int i = 0; i < V; i++) {
        const vec near = load(x + l.column[j + i] / V * V);
        sum += w[i] * __builtin_shuffle(near, __builtin_convertvector(l.lane[group * l.A + j + i], ivec));
      }
    }
    for (; j < l.A; j++) UNROLL
    for (int i = 0; i < V; i++) sum[i] += l.v[at[i] + j] * x[l.column[at[i] + j]];
    sum = relu && sum < 0.f ? vec{} : sum;
    memcpy(y + group * V, &sum, 4 * n);
  }
}

template <int ID>
static float* scratch(int64_t n) {  // kept per thread, aligned to cache lines
  static thread_local std::vector<float> buffer;
  if ((int64_t)buffer.size() < n + 16) buffer.resize(n + 16);
  return (float*)(((uintptr_t)buffer.data() + 63) / 64 * 64);
}

// Linear layers with ReLU between them, with how many inputs, outputs and values come before each.
struct Network : std::vector<Layer> {
  std::vector<int64_t> inputs = {0}, outputs = {0}, values = {0};
  Network(const Tensor& x, TensorList layers) {  // values, bias, layout of each layer in turn
    TORCH_CHECK(layers.size() && layers.size() % 3 == 0, "needs values, bias and layout of each layer");
    TORCH_CHECK(x.dim() == 2 && x.is_cpu(), "needs x [B, C] on the CPU");
    for (size_t i = 0; i < layers.size(); i += 3) {
      const Layer& l = emplace_back(i ? back().R : x.size(1), layers[i], layers[i + 1], layers[i + 2]);
      inputs.push_back(inputs.back() + l.C), outputs.push_back(outputs.back() + l.R);
      values.push_back(values.back() + l.R * l.A);
    }
  }
};

// Each tile goes through all layers at once. The tape keeps the input of every layer, tiles as they are.
std::tuple<Tensor, Tensor> mlp(const Tensor& x_, TensorList layers, bool save) {
  const Network net(x_, layers);
  const Tensor x = x_.contiguous();
  const int64_t B = x.size(0), C = x.size(1), R = net.back().R, width = net.inputs.back();
  const Tensor y = at::empty({B, R}, x.options());
  const Tensor tape = at::empty({save ? (B + 127) / 128 * 128 * width : 0}, x.options());  // 128: the longest TILE
  const float* xp = x.data_ptr<float>();
  float *yp = y.data_ptr<float>(), *tp = tape.data_ptr<float>();
  if (!save && B < V) {  // acting: too few samples to fill the lanes
    for (int64_t s = 0; s < B; s++) {
      float* in = scratch<0>(width + R + 2 * V * (net.size() + 1));
      std::copy_n(xp + s * C, C, in);
      for (const Layer& l : net) {
        float* out = in + l.C + V;  // a register of the input may reach past its end
        at::parallel_for(0, (l.R + V - 1) / V, 65536 / (V * l.A) + 1, [&](int64_t first, int64_t last) {
          rows_of_sample(l, in, out, first, last, &l != &net.back());
        });
        in = out;
      }
      std::copy_n(in, R, yp + s * R);
    }
    return {y, tape};
  }
  const int64_t tiles = (B + TILE - 1) / TILE;
  if (save) std::fill(tp + tiles * TILE * width, tp + tape.numel(), 0);
  at::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
    float* own = scratch<0>((width + R) * TILE);
    for (int64_t t = first, s = t * TILE; t < last; t++, s += TILE) {
      float* in = save ? tp + t * width * TILE : own;
      turn<true>(xp + s * C, B - s, C, in);
      for (const Layer& l : net) {
        const bool hidden = &l != &net.back();
        float* out = hidden ? in + l.C * TILE : own + width * TILE;
        product(l.v, l.column, l.range, l.blocks, l.R, in, out, l.b, hidden, nullptr);
        in = out;
      }
      turn<false>(yp + s * R, B - s, R, in);
    }
  });
  return {y, tape};
}

std::tuple<Tensor, std::vector<Tensor>> mlp_backward(const Tensor& grad, const Tensor& x, const Tensor& tape,
                                                     TensorList layers, bool need_x, bool need_w) {
  const Network net(x, layers);
  const Tensor g = grad.contiguous(), dx = at::empty({need_x ? x.size(0) : 0, x.size(1)}, x.options());
  const int64_t B = x.size(0), C = x.size(1), R = net.back().R, L = net.size(), tiles = (B + TILE - 1) / TILE;
  const int64_t width = net.inputs.back() * TILE, g_width = net.outputs.back() * TILE;
  TORCH_CHECK(g.size(0) == B && g.size(1) == R, "the gradient has another shape than the output");
  TORCH_CHECK(tape.numel() >= tiles * width, "no tape for a gradient: mlp was called with save=False");
  std::vector<Tensor> dw;  // of values and bias of each layer in turn
  for (const Layer& l : net) {
    dw.push_back(at::zeros({need_w ? l.R : 0, l.A}, x.options()));
    dw.push_back(at::zeros({need_w && l.b ? l.R : 0}, x.options()));
  }
  const float *gp = g.data_ptr<float>(), *tp = tape.data_ptr<float>();
  float *dxp = dx.data_ptr<float>(), *gt = scratch<1>(tiles * g_width), *vt = scratch<2>(net.values.back());
  for (int64_t i = !need_x; i < L; i++)
    at::parallel_for(0, net[i].R * net[i].A, 8192, [&](int64_t j, int64_t last) {
      for (; j < last; j++) vt[net.values[i] + net[i].place[j]] = net[i].v[j];
    });
  at::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
    float* own = scratch<0>(C * TILE);
    for (int64_t t = first, s = t * TILE; t < last; t++, s += TILE) {
      turn<true>(gp + s * R, B - s, R, gt + t * g_width + net.outputs[L - 1] * TILE);
      for (int64_t i = L - 1; i >= !need_x; i--) {
        const Layer& l = net[i];
        float *from = gt + t * g_width + net.outputs[i] * TILE, *to = i ? from - l.C * TILE : own;
        const float* gate = i ? tp + t * width + net.inputs[i] * TILE : nullptr;
        product(vt + net.values[i], l.row, l.t_range, l.t_blocks, l.C, from, to, nullptr, false, gate);
      }
      if (need_x) turn<false>(dxp + s * C, B - s, C, own);
    }
  });
  const int64_t shares = need_w ? at::get_num_threads() : 0;  // each thread takes a share of the rows of every layer
  at::parallel_for(0, shares, 1, [&](int64_t share, int64_t last) {
    for (; share < last; share++)
      for (int64_t i = 0; i < L; i++) {
        const int64_t begin = net[i].R * share / shares, end = net[i].R * (share + 1) / shares;
        weight_gradient(net[i], gt + net.outputs[i] * TILE, g_width, tp + net.inputs[i] * TILE, width, tiles, begin,
                        end, dw[2 * i].data_ptr<float>(), dw[2 * i + 1].data_ptr<float>());
      }
  });
  return {dx, dw};
}

// W' <- tau W + (1 - tau) W' over all entries, and b'. Both masters get their values first, then the target's follow.
void polyak(TensorList online, TensorList masters, TensorList target, TensorList target_masters, double tau) {
  TORCH_CHECK(
      online.size() == 3 * masters.size() && target.size() == online.size() && target_masters.size() == masters.size(),
      "needs values, bias, layout and master of the same layers");
  const float share = tau;
  for (size_t i = 0; i < masters.size(); i++) {
    const int64_t C = masters[i].size(1);
    const Layer from(C, online[3 * i], online[3 * i + 1], online[3 * i + 2]);
    const Layer to(C, target[3 * i], target[3 * i + 1], target[3 * i + 2]);
    TORCH_CHECK(from.R == to.R && from.A == to.A && !from.b == !to.b && masters[i].size(0) == from.R &&
                    masters[i].sizes() == target_masters[i].sizes(),
                "the two layers differ in shape");
    for (const Tensor& t : {target[3 * i], target[3 * i + 1], masters[i], target_masters[i]}) {
      TORCH_CHECK(t.is_contiguous(), "values, biases and masters have to be contiguous");
      t.unsafeGetTensorImpl()->bump_version();
    }
    float *w = masters[i].data_ptr<float>(), *tw = target_masters[i].data_ptr<float>();
    float *tv = (float*)to.v, *tb = (float*)to.b;
    at::parallel_for(0, from.R, 16384 / C + 1, [&](int64_t r, int64_t last) {
      for (; r < last; r++) {
        const int64_t begin = r * from.A, end = begin + from.A;
        for (int64_t j = begin; j < end; j++) w[r * C + from.column[j]] = from.v[j];
        for (int64_t j = begin; j < end; j++) tw[r * C + to.column[j]] = tv[j];
        int64_t c = r * C;
        for (; c + V <= (r + 1) * C; c += V) store(tw + c, load(tw + c) + share * (load(w + c) - load(tw + c)));
        for (; c < (r + 1) * C; c++) tw[c] += share * (w[c] - tw[c]);
        for (int64_t j = begin; j < end; j++) tv[j] = tw[r * C + to.column[j]];
        if (tb) tb[r] += share * (from.b[r] - tb[r]);
      }
    });
  }
}

// How many of its group of m, a divisor of V, are larger than each of V weights, or as large and in a lower column.
// Magnitudes are compared as integers, which the bits of positive floats are in the same order as; NaN is the largest.
INLINE ivec larger_ones(const float* w, int m) {
  const ivec magnitude = *(const ivec*)w & 0x7fffffff;
  ivec larger = {}, lane;
  UNROLL
  for (int i = 0; i < V; i++) lane[i] = i;
  for (int shift = 1; shift < m; shift++) {
    const ivec wrapped = (lane & (m - 1)) + shift >= m;
    const ivec other = __builtin_shuffle(magnitude, lane + shift + (wrapped & -m));
    larger -= (other > magnitude) | ((other == magnitude) & wrapped);
  }
  return larger;
}
// The columns from `c` to `end` of a row that P_NM keeps, ascending.
static void select(const float* w, int64_t c, int64_t end, int64_t n, int64_t m, int64_t* ids) {
  std::vector<uint64_t> group;
  for (; c < end; c += m) {
    for (int64_t i = c; i < min(c + m, end); i++) {
      uint32_t bits;
      memcpy(&bits, w + i, 4);
      group.push_back((uint64_t)(0x7fffffff - (bits & 0x7fffffff)) << 32 | i);
    }
    const int64_t kept = min<int64_t>(n, group.size());
    std::nth_element(group.begin(), group.begin() + kept - 1, group.end());
    for (int64_t i = 0; i < kept; i++) ids[i] = group[i] & 0xffffffff;
    std::sort(ids, ids + kept);
    ids += kept, group.clear();
  }
}
// The same for a whole row. Where the mask stays as it is `now`, V columns at once cost but a look.
static void select_row(const float* w, int64_t C, int64_t n, int64_t m, const int64_t* now, int64_t* ids) {
  int64_t c = 0;
  for (const int64_t kept = V / m * n; V % m == 0 && c + V <= C; c += V, now += kept, ids += kept) {
    const ivec larger = larger_ones(w + c, m);
    bool same = true;
    for (int64_t j = 0; j < kept; j++) same = same && (size_t)(now[j] - c) < V && larger[now[j] - c] < n;
    if (same) std::copy_n(now, kept, ids);
    else select(w, c, c + V, n, m, ids);
  }
  select(w, c, C, n, m, ids);
}

// NMLinear.project of several layers, with as many optimizer states each. Rows whose mask stays cost but the look.
std::vector<int64_t> project(TensorList values, TensorList index, TensorList masters, TensorList layouts,
                             TensorList states, TensorList state_masters, int64_t n, int64_t m, TensorList given) {
  const size_t L = values.size(), S = L ? states.size() / L : 0;
  TORCH_CHECK(index.size() == L && masters.size() == L && layouts.size() == L && states.size() == S * L &&
                  state_masters.size() == S * L && (given.empty() || given.size() == L),
              "lists of different lengths");
  for (TensorList tensors : {values, index, masters, layouts, states, state_masters})
    for (const Tensor& t : tensors) {
      TORCH_CHECK(t.is_contiguous(), "tensors have to be contiguous");
      t.unsafeGetTensorImpl()->bump_version();
    }
  std::vector<Layer> layers;
  std::vector<int64_t> changed(L);
  for (size_t i = 0; i < L; i++) {
    const int64_t R = values[i].size(0), A = values[i].size(1), C = masters[i].size(1);
    const Layer& l = layers.emplace_back(R, A, C, layouts[i].data_ptr<int>());
    TORCH_CHECK(l.size == layouts[i].numel() && index[i].sizes() == values[i].sizes() && masters[i].size(0) == R &&
                    (given.empty() || given[i].sizes() == index[i].sizes()),
                "the tensors of a layer differ in shape");
    TORCH_CHECK(1 <= n && n <= m && A == C / m * n + min(n, C % m), "values do not have the size of this N:M");
    for (size_t s = i * S; s < (i + 1) * S; s++)
      TORCH_CHECK(states[s].sizes() == values[i].sizes() && state_masters[s].sizes() == masters[i].sizes(), "state");
    float *v = values[i].data_ptr<float>(), *w = masters[i].data_ptr<float>();
    int64_t *id = index[i].data_ptr<int64_t>(), *other = given.empty() ? nullptr : given[i].data_ptr<int64_t>();
    std::atomic<int64_t> sad = 0;
    at::parallel_for(0, R, 16384 / C + 1, [&](int64_t r, int64_t last) {
      std::vector<int64_t> next(A + V);
      for (; r < last; r++) {
        int64_t *now = id + r * A, stayed = 0;
        for (int64_t j = 0; j < A; j++) w[r * C + now[j]] = v[r * A + j];
        if (other) std::copy_n(other + r * A, A, next.data());
        else select_row(w + r * C, C, n, m, now, next.data());
        if (std::equal(now, now + A, next.data())) continue;
        for (int64_t k = 0, j = 0; k < A && j < A;)
          if (now[k] == next[j]) stayed++, k++, j++;
          else if (now[k] < next[j]) k++;
          else j++;
        sad += 2 * (A - stayed);
        for (size_t s = i * S; s < (i + 1) * S; s++) {
          float *state = states[s].data_ptr<float>() + r * A, *all = state_masters[s].data_ptr<float>() + r * C;
          for (int64_t j = 0; j < A; j++) all[now[j]] = state[j];
          for (int64_t j = 0; j < A; j++) state[j] = all[next[j]];
        }
        for (int64_t j = 0; j < A; j++) now[j] = next[j], v[r * A + j] = w[r * C + next[j]];
      }
    });
    changed[i] = sad;
  }
  at::parallel_for(0, L, 1, [&](int64_t i, int64_t last) {
    for (; i < last; i++)
      if (changed[i]) write_layout(layers[i], index[i].data_ptr<int64_t>());
  });
  return changed;
}

// A step of torch.optim.Adam with fused=True, which spends more time on what surrounds it.
__attribute__((optimize("tree-vectorize"))) static void adam_range(int64_t n, float* __restrict p, float* __restrict m,
                                                                   float* __restrict s, const float* __restrict g,
                                                                   float beta1, float beta2, float rate,
                                                                   float correction, float eps) {
  for (int64_t i = 0; i < n; i++) {
    m[i] += (1 - beta1) * (g[i] - m[i]);
    s[i] = beta2 * s[i] + (1 - beta2) * g[i] * g[i];
    p[i] -= rate * m[i] / (std::sqrt(s[i]) / correction + eps);
  }
}
void adam(TensorList parameters, TensorList gradients, TensorList averages, TensorList squares, TensorList steps,
          double lr, double beta1, double beta2, double eps) {
  for (size_t i = 0; i < parameters.size(); i++) {
    for (const Tensor& t : {parameters[i], gradients[i], averages[i], squares[i]})
      TORCH_CHECK(t.is_contiguous() && t.numel() == parameters[i].numel(), "parameter, gradient and state do not fit");
    parameters[i].unsafeGetTensorImpl()->bump_version();
    float *p = parameters[i].data_ptr<float>(), *m = averages[i].data_ptr<float>(), *s = squares[i].data_ptr<float>();
    const float *g = gradients[i].data_ptr<float>(), step = *steps[i].data_ptr<float>() += 1;
    const double rate = lr / (1 - std::pow(beta1, step)), correction = std::sqrt(1 - std::pow(beta2, step));
    at::parallel_for(0, parameters[i].numel(), 16384, [&](int64_t j, int64_t last) {
      adam_range(last - j, p + j, m + j, s + j, g + j, beta1, beta2, rate, correction, eps);
    });
  }
}

// What the actor's output becomes; action_range: low, high, half the range, its middle.
static Tensor squash(const Tensor& output, TensorList action_range) {
  return output.tanh().mul_(action_range[2]).add_(action_range[3]);
}
Tensor act(const Tensor& obs, TensorList actor, TensorList action_range, double noise) {
  Tensor action = squash(std::get<0>(mlp(obs, actor, false)), action_range);
  if (noise > 0) action.add_(at::randn_like(action).mul_(action_range[2] * noise));
  return action.clamp_(action_range[0], action_range[1]);
}

// What TD3.update_critics does up to the optimizer's step; autograd would cost as much as the products. Returns the
// values of both critics, their target, and the gradients.
std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> critic_gradients(TensorList batch, TensorList action_range,
                                                                         double policy_noise, double noise_clip,
                                                                         double gamma, TensorList actor_target,
                                                                         TensorList qf1_target, TensorList qf2_target,
                                                                         TensorList qf1, TensorList qf2) {
  const Tensor &obs = batch[0], &action = batch[1], &next_obs = batch[2], &reward = batch[3], &terminated = batch[4];
  const auto q = [](const Tensor& x, TensorList net) { return std::get<0>(mlp(x, net, false)).squeeze(1); };
  Tensor noise = at::randn_like(action).mul_(policy_noise).clamp_(-noise_clip, noise_clip).mul_(action_range[2]);
  Tensor next_action = squash(std::get<0>(mlp(next_obs, actor_target, false)), action_range).add_(noise);
  const Tensor next_x = at::cat({next_obs, next_action.clamp_(action_range[0], action_range[1])}, 1);
  const Tensor next_q = at::minimum(q(next_x, qf1_target), q(next_x, qf2_target));
  const Tensor target_q = reward + (1 - terminated) * gamma * next_q, x = at::cat({obs, action}, 1);
  std::vector<Tensor> values, gradients;
  for (TensorList net : {qf1, qf2}) {
    const auto [y, tape] = mlp(x, net, true);
    values.push_back(y.squeeze(1));
    const Tensor grad = (values.back() - target_q).mul_(2. / x.size(0)).unsqueeze(1);
    const auto [dx, dw] = mlp_backward(grad, x, tape, net, false, true);
    gradients.insert(gradients.end(), dw.begin(), dw.end());
  }
  return {values[0], values[1], target_q, gradients};
}

// TD3.update_actor likewise: the loss, and the gradients.
std::tuple<Tensor, std::vector<Tensor>> actor_gradients(const Tensor& obs, TensorList action_range, TensorList actor,
                                                        TensorList qf1) {
  const auto [output, actor_tape] = mlp(obs, actor, true);
  const Tensor squashed = output.tanh(), scale = action_range[2];
  const Tensor x = at::cat({obs, squashed * scale + action_range[3]}, 1);
  const auto [q, tape] = mlp(x, qf1, true);
  const Tensor dq = at::full_like(q, -1. / q.size(0)), dx = std::get<0>(mlp_backward(dq, x, tape, qf1, true, false));
  const Tensor dy = dx.narrow(1, obs.size(1), scale.size(0)) * scale * (1 - squashed * squashed);
  return {-q.mean(), std::get<1>(mlp_backward(dy, obs, actor_tape, actor, false, true))};
}

TORCH_LIBRARY(rnm_td3, m) {
  m.def("layout(Tensor index, int columns) -> Tensor", layout);
  m.def("mlp(Tensor x, Tensor[] layers, bool save) -> (Tensor y, Tensor tape)");
  m.def(
      "mlp_backward(Tensor grad, Tensor x, Tensor tape, Tensor[] layers, bool need_x, bool need_w) -> "
      "(Tensor dx, Tensor[] dlayers)");
  m.def(
      "polyak(Tensor[] online, Tensor(a!)[] masters, Tensor(b!)[] target, Tensor(c!)[] target_masters, float tau) "
      "-> ()");
  m.def(
      "project(Tensor(a!)[] values, Tensor(b!)[] index, Tensor(c!)[] masters, Tensor(d!)[] layouts, "
      "Tensor(e!)[] states, Tensor(f!)[] state_masters, int n, int m, Tensor[] given) -> int[]");
  m.def(
      "adam(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] averages, Tensor(c!)[] squares, "
      "Tensor(d!)[] steps, float lr, float beta1, float beta2, float eps) -> ()");
  m.def("act(Tensor obs, Tensor[] actor, Tensor[] action_range, float noise) -> Tensor");
  m.def(
      "critic_gradients(Tensor[] batch, Tensor[] action_range, float policy_noise, float noise_clip, float gamma, "
      "Tensor[] actor_target, Tensor[] qf1_target, Tensor[] qf2_target, Tensor[] qf1, Tensor[] qf2) -> "
      "(Tensor, Tensor, Tensor, Tensor[])");
  m.def("actor_gradients(Tensor obs, Tensor[] action_range, Tensor[] actor, Tensor[] qf1) -> (Tensor, Tensor[])");
}
TORCH_LIBRARY_IMPL(rnm_td3, CPU, m) {
  m.impl("mlp", mlp), m.impl("mlp_backward", mlp_backward), m.impl("polyak", polyak), m.impl("project", project);
  m.impl("adam", adam), m.impl("act", act);
  m.impl("critic_gradients", critic_gradients), m.impl("actor_gradients", actor_gradients);
}

// The shapes of what they return, for torch.compile.
TORCH_LIBRARY_IMPL(rnm_td3, Meta, m) {
  m.impl("mlp", [](const Tensor& x, TensorList layers, bool save) {
    int64_t width = x.size(1);
    for (size_t i = 3; i < layers.size(); i += 3) width += layers[i - 3].size(0);
    const int64_t tape = save ? (x.size(0) + 127) / 128 * 128 * width : 0, rows = layers[layers.size() - 3].size(0);
    return std::make_tuple(x.new_empty({x.size(0), rows}), x.new_empty({tape}));
  });
  m.impl("mlp_backward",
         [](const Tensor&, const Tensor& x, const Tensor&, TensorList layers, bool need_x, bool need_w) {
           std::vector<Tensor> dw;
           for (size_t i = 0; i < layers.size(); i++) {
             std::vector<int64_t> shape = layers[i].sizes().vec();
             if (i % 3 < 2) shape[0] *= need_w, dw.push_back(x.new_empty(shape));
           }
           return std::make_tuple(x.new_empty({x.size(0) * need_x, x.size(1)}), dw);
         });
}

template <class F>
static auto op(const char* name, F*) {  // through the dispatcher, so that torch.compile can trace it
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}
std::tuple<Tensor, Tensor> mlp_below_autograd(const Tensor& x, TensorList layers, bool save) {
  at::AutoDispatchBelowADInplaceOrView guard;
  static auto mlp_op = op("rnm_td3::mlp", mlp);
  return mlp_op.call(x, layers, save);
}
struct Mlp : torch::autograd::Function<Mlp> {  // in C++: an autograd function in Python costs as much as a product
  using Context = torch::autograd::AutogradContext;
  using Tensors = torch::autograd::variable_list;
  static Tensors forward(Context* ctx, const Tensor& x, TensorList layers) {
    const auto [y, tape] = mlp_below_autograd(x, layers, true);
    Tensors saved = {x, tape};
    saved.insert(saved.end(), layers.begin(), layers.end());
    ctx->save_for_backward(saved);
    ctx->mark_non_differentiable({tape});
    ctx->set_materialize_grads(false);  // no zeros for the tape
    return {y, tape};
  }
  static Tensors backward(Context* ctx, const Tensors& grad) {
    const Tensors saved = ctx->get_saved_variables();
    const TensorList layers = TensorList(saved).slice(2);
    if (!grad[0].defined()) return Tensors(1 + layers.size());
    const bool need_x = ctx->needs_input_grad(0), need_w = ctx->needs_input_grad({{1, 1 + layers.size()}});
    static auto backward_op = op("rnm_td3::mlp_backward", mlp_backward);
    const auto [dx, dw] = backward_op.call(grad[0], saved[0], saved[1], layers, need_x, need_w);
    Tensors out(1 + layers.size());
    if (need_x) out[0] = dx;
    for (size_t i = 0; i < layers.size(); i++)
      if (i % 3 < 2 && ctx->needs_input_grad(1 + i)) out[1 + i] = dw[i / 3 * 2 + i % 3];
    return out;
  }
};
TORCH_LIBRARY_IMPL(rnm_td3, Autograd, m) {
  m.impl("mlp", [](const Tensor& x, TensorList layers, bool save) {
    if (!save) return mlp_below_autograd(x, layers, save);
    const auto y = Mlp::apply(x, layers);
    return std::make_tuple(y[0], y[1]);
  });
}
