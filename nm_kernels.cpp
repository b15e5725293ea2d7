// CPU kernels of rnm_td3_continuous.py: products that skip the zeros of N:M sparse layers, float32.
//
// operator           agrees with
// layout             nothing: what the kernels make of the index of a layer, see `struct Layer`
// forward            NMLinear.forward of layers with ReLU between them
// mlp, mlp_backward  the same, and autograd through it
// polyak             NMLinear.polyak_
// project            NMLinear.project and nm_mask
// act                Actor.act
// update_critics     TD3.update_critics
// update_actor       TD3.update_actor
//
// Lanes are samples: a tile of samples lies feature-major, so that an active weight is one scalar times a few
// contiguous vectors. That skips the zeros of any pattern and size without gathers, and serves W~ and its transpose
// alike.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
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
#define VECTORIZED __attribute__((optimize("tree-vectorize"))) static void  // by the compiler: plain loops
typedef float vec __attribute__((vector_size(4 * V), aligned(4), may_alias));
typedef int ivec __attribute__((vector_size(4 * V), aligned(4), may_alias));
INLINE vec load(const float* p) { return *(const vec*)p; }
INLINE void store(float* p, vec v) { *(vec*)p = v; }
INLINE vec clamp(vec v, float low, float high) {
  v = v < low ? vec{} + low : v;
  return v > high ? vec{} + high : v;
}

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

// A tile of x (batch-major, a row every `stride` floats) to [C][TILE] (IN), or back. Samples that x lacks are zeros in
// the tile.
template <bool IN, bool WHOLE>
INLINE void turn_block(float* x, int64_t stride, float* tile, int samples, int features) {
  const int S = WHOLE ? V : samples, F = WHOLE ? V : features;
  vec r[V] = {};
  if (IN) {
    UNROLL
    for (int i = 0; i < S; i++) memcpy(&r[i], x + i * stride, 4 * F);
    transpose(r);
    UNROLL
    for (int i = 0; i < F; i++) store(tile + i * TILE, r[i]);
  } else {
    UNROLL
    for (int i = 0; i < F; i++) r[i] = load(tile + i * TILE);
    transpose(r);
    UNROLL
    for (int i = 0; i < S; i++) memcpy(x + i * stride, &r[i], 4 * F);
  }
}
template <bool IN>
static void turn(const float* x, int64_t stride, int64_t samples, int64_t C, float* tile) {
  for (int64_t c = 0; c < C; c += V)
    for (int64_t s = 0; s < TILE; s += V) {
      float *from = (float*)x + s * stride + c, *to = tile + c * TILE + s;
      const int S = max<int64_t>(0, min<int64_t>(V, samples - s)), F = min<int64_t>(V, C - c);
      if (S == V && F == V) turn_block<IN, true>(from, stride, to, S, F);
      else turn_block<IN, false>(from, stride, to, S, F);
    }
}

// One layer. What its mask compiles to stands in one int tensor, `layout`:
//   range, column    W~: the values [begin, end) of each row by block of columns, [blocks][R][2]; their columns, [R][A]
//   t_range, row     its transpose: the like ranges [t_blocks][C][2]; the row of each value, column by column
//   place            where in the transpose each value of W~ stands, [R][A]
struct Layer {
  int64_t R, A, C, blocks, t_blocks, size;
  int *range, *t_range, *place;
  uint16_t *column, *row;
  Tensor values, bias;
  const float *v, *b = nullptr;
  Layer(int64_t R, int64_t A, int64_t C, int* p) : R(R), A(A), C(C), range(p) {
    blocks = (C + BLOCK - 1) / BLOCK, t_blocks = (R + BLOCK - 1) / BLOCK;
    t_range = range + 2 * blocks * R, place = t_range + 2 * t_blocks * C;
    column = (uint16_t*)(place + R * A), row = column + R * A, size = place + 2 * R * A - p;
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
  memset(l.range, 0, 4 * l.size);
  for (int64_t r = 0; r < R; r++)
    for (int64_t b = 0, j = 0; b < l.blocks; b++) {
      l.range[2 * (b * R + r)] = r * A + j;
      for (const int64_t* row = id + r * A; j < A && row[j] < (b + 1) * BLOCK; j++) {
        l.column[r * A + j] = row[j];
        l.t_range[2 * (r / BLOCK * l.C + row[j]) + 1]++;  // at first the number of values,
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
      l.row[end] = r, l.place[r * A + j] = end;
    }
}
static void check_index(const Tensor& index, int64_t columns) {
  const int64_t A = index.size(1), *id = index.data_ptr<int64_t>();
  for (int64_t j = 0; j < index.numel(); j++)
    TORCH_CHECK(id[j] >= 0 && id[j] < columns && (j % A == 0 || id[j - 1] < id[j]),
                "the columns of a row have to ascend and to lie in its matrix");
}
Tensor layout(const Tensor& index_, int64_t columns) {
  TORCH_CHECK(index_.is_cpu(), "the native backend is for the CPU");
  const Tensor index = index_.contiguous();
  const int64_t R = index.size(0), A = index.size(1), *id = index.data_ptr<int64_t>();
  TORCH_CHECK(max(R, columns) <= 65536 && R * A <= INT_MAX / 4, "native layers have up to 65536 neurons");
  check_index(index, columns);
  Tensor out = at::empty({Layer(R, A, columns, nullptr).size}, at::kInt);
  write_layout(Layer(R, A, columns, out.data_ptr<int>()), id);
  return out;
}

// A row of a product's tile: its ReLU, or the gradient of one: zero where the gate is.
INLINE void finish(vec* sum, float* out, bool relu, const float* gate) {
  UNROLL
  for (int k = 0; k < T; k++) {
    if (relu) sum[k] = sum[k] < 0.f ? vec{} : sum[k];
    if (gate) sum[k] = load(gate + k * V) <= 0.f ? vec{} : sum[k];
    store(out + k * V, sum[k]);
  }
}

// A tile of Y = X W~^T + b, and of dX = G W~ with the transpose, rows from `first` on: out[r] = bias[r] + sum of
// v[j] in[index[j]] over the ranges of r.
static void sparse_product(const float* v, const uint16_t* index, const int* ranges, int64_t blocks, int64_t first,
                           int64_t rows, const float* in, float* out, const float* bias, bool relu, const float* gate) {
  for (int64_t block = 0; block < blocks; block++)
    for (int64_t r = first; r < rows; r++) {
      const int* range = ranges + 2 * (block * rows + r);
      for (int j = range[2]; j < range[2] + range[1] - range[0]; j += 16)  // of the next row
        __builtin_prefetch(v + j), __builtin_prefetch(index + j);
      float* to = out + (r - first) * TILE;
      vec sum[T];
      UNROLL
      for (int k = 0; k < T; k++) sum[k] = block ? load(to + k * V) : vec{} + (bias ? bias[r] : 0);
      for (int j = range[0]; j < range[1]; j++) {
        const float* x = in + (int64_t)index[j] * TILE;
        asm("" : "+r"(x));  // in one register: Intel splits a multiply-add whose operand is at the sum of two
        UNROLL
        for (int k = 0; k < T; k++) sum[k] += v[j] * load(x + k * V);
      }
      const bool last = block == blocks - 1;
      finish(sum, to, last && relu, last && gate ? gate + (r - first) * TILE : nullptr);
    }
}
// The same where all weights are active: out[r] = bias[r] + sum of v[r * row + j * column] in[j]. N rows share a load.
template <int N = V == 16 ? 3 : 1>
static void dense_product(const float* v, int64_t row, int64_t column, int64_t rows, int64_t columns, const float* in,
                          float* out, const float* bias, bool relu, const float* gate) {
  for (; rows >= N; rows -= N, v += N * row, out += N * TILE) {
    vec sum[N][T];
    UNROLL
    for (int i = 0; i < N * T; i++) sum[i / T][i % T] = vec{} + (bias ? bias[i / T] : 0);
    for (int64_t j = 0; j < columns; j++) {
      UNROLL
      for (int k = 0; k < T; k++) {
        const vec x = load(in + j * TILE + k * V);
        UNROLL
        for (int i = 0; i < N; i++) sum[i][k] += v[i * row + j * column] * x;
      }
    }
    UNROLL
    for (int i = 0; i < N; i++) finish(sum[i], out + i * TILE, relu, gate ? gate + i * TILE : nullptr);
    bias = bias ? bias + N : nullptr, gate = gate ? gate + N * TILE : nullptr;
  }
  if constexpr (N > 1) dense_product<1>(v, row, column, rows, columns, in, out, bias, relu, gate);
}
static void times(const Layer& l, const float* in, float* out, bool relu) {
  if (l.A == l.C) dense_product(l.v, l.C, 1, l.R, l.C, in, out, l.b, relu, nullptr);
  else sparse_product(l.v, l.column, l.range, l.blocks, 0, l.R, in, out, l.b, relu, nullptr);
}
static void times_transposed(const Layer& l, const float* vt, const float* in, float* out, const float* gate,
                             int64_t first) {
  if (l.A == l.C) dense_product(l.v + first, 1, l.C, l.C - first, l.R, in, out, nullptr, false, gate);
  else sparse_product(vt, l.row, l.t_range, l.t_blocks, first, l.C, in, out, nullptr, false, gate);
}

// A tile's share of dW~ at the active entries, and of db: dot products of rows of G^T with rows of X^T, V at once: of N
// rows of W~ and V / N columns, which rows of a dense layer share. The columns of a row after the other, so that theirs
// of X^T stay in the first-level cache; or the rows, of a dense layer.
template <int N, bool DENSE>
static void weight_gradient(const Layer& l, const float* g, const float* x, float* dv, float* db) {
  constexpr int J = V / N;
  const auto cell = [&](int64_t r, int64_t j, int rows, int n) __attribute__((always_inline)) {
    const float *xj[V], *gr = g + r * TILE;
    const uint16_t* column = l.column + r * l.A + j;
    vec sum[V] = {};
    UNROLL
    for (int i = 0; i < (DENSE ? J : V); i++) xj[i] = x + column[min(i / J, rows - 1) * l.A + min(i % J, n - 1)] * TILE;
    UNROLL
    for (int k = 0; k < T; k++) {
      UNROLL
      for (int i = 0; i < V; i++)
        sum[i] += load(gr + min(i / J, rows - 1) * TILE + k * V) * load(xj[DENSE ? i % J : i] + k * V);
    }
    add_lanes(sum);
    const vec total = sum[0];  // the array stays in registers
    UNROLL
    for (int i = 0; i < N; i++)
      if (i < rows) memcpy(dv + (r + i) * l.A + j, (float*)&total + i * J, 4 * n);
  };
  const auto cells = [&](int64_t r, int64_t j) {
    if (r + N <= l.R && j + J <= l.A) cell(r, j, N, J);
    else cell(r, j, min<int64_t>(N, l.R - r), min<int64_t>(J, l.A - j));
  };
  if (DENSE)
    for (int64_t r = 0; r < l.R; r += N)
      for (int64_t j = 0; j < l.A; j += J) cells(r, j);
  else
    for (int64_t j = 0; j < l.A; j += J)
      for (int64_t r = 0; r < l.R; r += N) cells(r, j);
  for (int64_t r = 0; l.b && r < l.R; r += V) {
    vec sum[V] = {};
    const int n = min<int64_t>(V, l.R - r);
    for (int i = 0; i < n; i++) UNROLL
    for (int k = 0; k < T; k++) sum[i] += load(g + (r + i) * TILE + k * V);
    add_lanes(sum);
    const vec total = sum[0];
    std::copy_n((float*)&total, n, db + r);
  }
}

// One sample: four sums for each row. Lanes would have to be gathered, which takes longer.
static void times_sample(const Layer& l, const float* x, float* y, bool relu) {
  at::parallel_for(0, l.R, 65536 / l.A + 1, [&](int64_t r, int64_t last) {
    for (; r < last; r++) {
      const float* v = l.v + r * l.A;
      const uint16_t* column = l.column + r * l.A;
      float sum[4] = {l.b ? l.b[r] : 0};
      int64_t j = 0;
      for (; j + 4 <= l.A; j += 4) UNROLL
      for (int k = 0; k < 4; k++) sum[k] += v[j + k] * x[column[j + k]];
      for (; j < l.A; j++) sum[0] += v[j] * x[column[j]];
      const float out = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      y[r] = relu && out < 0 ? 0 : out;
    }
  });
}

static float* scratch(int id, int64_t n) {  // kept per thread, aligned to cache lines
  static thread_local std::vector<float> buffers[4];
  if ((int64_t)buffers[id].size() < n + 16) buffers[id].resize(n + 16);
  return (float*)(((uintptr_t)buffers[id].data() + 63) / 64 * 64);
}

// Linear layers with ReLU between them.
struct Network : std::vector<Layer> {
  std::vector<int64_t> inputs = {0}, outputs = {0}, parameters = {0};  // how many come before each layer
  Network(int64_t C, TensorList layers) {                              // values, bias, layout of each layer in turn
    TORCH_CHECK(layers.size() && layers.size() % 3 == 0, "needs values, bias and layout of each layer");
    for (size_t i = 0; i < layers.size(); i += 3) {
      const Layer& l = emplace_back(i ? back().R : C, layers[i], layers[i + 1], layers[i + 2]);
      inputs.push_back(inputs.back() + l.C), outputs.push_back(outputs.back() + l.R);
      parameters.push_back(parameters.back() + l.R * (l.A + 1));
    }
  }
  // A tile through all layers. rest: gets the outputs of all layers, one after the other; out: of the last, instead.
  void forward(const float* in, float* rest, float* out) const {
    for (const Layer& l : *this) {
      const bool last = &l == &back();
      times(l, in, last ? out : rest, !last);
      in = rest, rest += l.R * TILE;
    }
  }
  // And back. tape: the inputs of all layers; g: the gradients of their outputs, of which the last is given; dw: gets
  // the gradients of values and bias of all layers; dx: that of the input from feature `first` on; vt: see `transpose`.
  void backward(const float* tape, float* g, const float* vt, float* dw, float* dx, int64_t first = 0) const {
    for (int64_t i = size() - 1; i >= 0; i--) {
      const Layer& l = (*this)[i];
      const float *from = g + outputs[i] * TILE, *x = tape + inputs[i] * TILE;
      float *dv = dw + parameters[i], *db = dv + l.R * l.A, *to = i ? g + outputs[i - 1] * TILE : dx;
      if (dw && l.A == l.C) weight_gradient<max(1, V / 4), true>(l, from, x, dv, db);
      else if (dw && l.A <= V / 4) weight_gradient<4, false>(l, from, x, dv, db);
      else if (dw && l.A <= V / 2) weight_gradient<2, false>(l, from, x, dv, db);
      else if (dw) weight_gradient<1, false>(l, from, x, dv, db);
      if (to) times_transposed(l, vt + parameters[i], from, to, i ? x : nullptr, i ? 0 : first);
    }
  }
  // The values of a share of every layer, in the order of the layer's transpose: of whole blocks of rows, since theirs
  // lie together there.
  void transpose(float* vt, int64_t share, int64_t shares, bool need_x) const {
    for (size_t i = !need_x; i < size(); i++) {
      const Layer& l = (*this)[i];
      const int64_t first = l.t_blocks * share / shares * BLOCK, last = l.t_blocks * (share + 1) / shares * BLOCK;
      for (int64_t j = first * l.A; j < min(last, l.R) * l.A && l.A < l.C; j++) vt[parameters[i] + l.place[j]] = l.v[j];
    }
  }
  const float* forward_sample(const float* x) const {
    float* out = scratch(0, outputs.back());
    for (const Layer& l : *this) times_sample(l, x, out, &l != &back()), x = out, out += l.R;
    return x;
  }
};
static int64_t tiles_of(int64_t B) { return (B + TILE - 1) / TILE; }
// In parallel, f(i) for each i below n; f(share, shares) for each thread.
template <class F>
static void for_each(int64_t n, const F& f) {
  at::parallel_for(0, n, 1, [&](int64_t i, int64_t last) {
    for (; i < last; i++) f(i);
  });
}
template <class F>
static void for_shares(const F& f) {
  for_each(at::get_num_threads(), [&, shares = at::get_num_threads()](int64_t share) { f(share, shares); });
}
// Adds the gradients of all tiles, `stride` floats from one to the next, to those of the first.
VECTORIZED add_tiles(float* dw, int64_t stride, int64_t tiles, int64_t n) {
  for (int64_t t = 1; t < tiles; t++)
    for (int64_t i = 0; i < n; i++) dw[i] += dw[t * stride + i];
}

// Each tile goes through all layers at once. tape: keeps the input of every layer, tiles as they are; or null.
static Tensor run(const Network& net, const Tensor& x_, float* tape) {
  TORCH_CHECK(x_.dim() == 2 && x_.is_cpu(), "needs x [B, C] on the CPU");
  const Tensor x = x_.contiguous(), y = at::empty({x.size(0), net.back().R}, x.options());
  const int64_t B = x.size(0), C = x.size(1), R = net.back().R, width = net.inputs.back();
  const float* xp = x.data_ptr<float>();
  float* yp = y.data_ptr<float>();
  if (!tape && B < V) {  // too few samples to fill the lanes
    for (int64_t s = 0; s < B; s++) std::copy_n(net.forward_sample(xp + s * C), R, yp + s * R);
    return y;
  }
  for_each(tiles_of(B), [&](int64_t t) {
    const int64_t s = t * TILE;
    float *in = tape ? tape + s * width : scratch(0, width * TILE), *out = scratch(1, R * TILE);
    turn<true>(xp + s * C, C, B - s, C, in);
    net.forward(in, in + C * TILE, out);
    turn<false>(yp + s * R, R, B - s, R, out);
  });
  return y;
}
Tensor forward(const Tensor& x, TensorList layers) { return run(Network(x.size(1), layers), x, nullptr); }
std::tuple<Tensor, Tensor> mlp(const Tensor& x, TensorList layers) {
  const Network net(x.size(1), layers);
  const int64_t width = net.inputs.back(), padded = (x.size(0) + 127) / 128 * 128;  // 128: the longest TILE
  const Tensor tape = at::empty({padded * width}, x.options());
  float* tp = tape.data_ptr<float>();
  std::fill(tp + tiles_of(x.size(0)) * TILE * width, tp + tape.numel(), 0);
  return {run(net, x, tp), tape};
}

// dw: of values and bias of each layer in turn, one after the other.
std::tuple<Tensor, Tensor> mlp_backward(const Tensor& grad, const Tensor& x, const Tensor& tape, TensorList layers,
                                        bool need_x, bool need_w) {
  const Network net(x.size(1), layers);
  const int64_t B = x.size(0), C = x.size(1), R = net.back().R, width = net.inputs.back(), tiles = tiles_of(B);
  const int64_t size = need_w ? net.parameters.back() : 0, g_width = net.outputs.back();
  const Tensor g = grad.contiguous(), dx = at::empty({need_x ? B : 0, C}, x.options());
  const Tensor dw = at::zeros({size}, x.options());
  TORCH_CHECK(g.size(0) == B && g.size(1) == R, "the gradient has another shape than the output");
  TORCH_CHECK(tape.numel() >= tiles * TILE * width, "the tape is of another batch");
  const float *gp = g.data_ptr<float>(), *tp = tape.data_ptr<float>();
  float *dxp = dx.data_ptr<float>(), *vt = scratch(2, net.parameters.back()), *parts = scratch(3, tiles * size);
  for_shares([&](int64_t share, int64_t shares) { net.transpose(vt, share, shares, need_x); });
  for_each(tiles, [&](int64_t t) {
    const int64_t s = t * TILE;
    float *own = scratch(0, C * TILE), *gs = scratch(1, g_width * TILE);
    turn<true>(gp + s * R, R, B - s, R, gs + (g_width - R) * TILE);
    net.backward(tp + s * width, gs, vt, need_w ? parts + t * size : nullptr, need_x ? own : nullptr);
    if (need_x) turn<false>(dxp + s * C, C, B - s, C, own);
  });
  for_shares([&](int64_t share, int64_t shares) {
    const int64_t first = size * share / shares, last = size * (share + 1) / shares;
    add_tiles(parts + first, size, tiles, last - first);
    if (tiles) std::copy_n(parts + first, last - first, dw.data_ptr<float>() + first);
  });
  return {dx, dw};
}

VECTORIZED follow(float* to, const float* from, float rate, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] += rate * (from[i] - to[i]);
}
// W' <- tau W + (1 - tau) W' over all entries, and b'. In a row whose two masks differ, both masters get their values
// first, then the target's follow; else those of active entries stay as stale as they are.
void polyak(TensorList online, TensorList masters, TensorList target, TensorList target_masters, double tau) {
  const size_t L = masters.size();
  TORCH_CHECK(online.size() == 3 * L && target.size() == 3 * L && target_masters.size() == L, "different lengths");
  std::vector<Layer> from, to;
  for (size_t i = 0; i < L; i++) {
    const Layer& a = from.emplace_back(masters[i].size(1), online[3 * i], online[3 * i + 1], online[3 * i + 2]);
    const Layer& b = to.emplace_back(a.C, target[3 * i], target[3 * i + 1], target[3 * i + 2]);
    TORCH_CHECK(a.R == b.R && a.A == b.A && !a.b == !b.b && masters[i].size(0) == a.R &&
                    masters[i].sizes() == target_masters[i].sizes(),
                "the two layers differ in shape");
    for (const Tensor& t : {target[3 * i], target[3 * i + 1], masters[i], target_masters[i]}) {
      TORCH_CHECK(t.is_contiguous(), "values, biases and masters have to be contiguous");
      t.unsafeGetTensorImpl()->bump_version();
    }
  }
  for_shares([&](int64_t share, int64_t shares) {
    for (size_t i = 0; i < L; i++) {
      const int64_t A = from[i].A, C = from[i].C, R = from[i].R;
      for (int64_t r = R * share / shares; r < R * (share + 1) / shares; r++) {
        const float* v = from[i].v + r * A;
        const uint16_t *column = from[i].column + r * A, *other = to[i].column + r * A;
        float *w = masters[i].data_ptr<float>() + r * C, *tw = target_masters[i].data_ptr<float>() + r * C;
        float *tv = (float*)to[i].v + r * A, *tb = (float*)to[i].b;
        const bool same = std::equal(column, column + A, other);
        for (int64_t j = 0; j < A && !same; j++) w[column[j]] = v[j], tw[other[j]] = tv[j];
        if (A < C) follow(tw, w, tau, C);
        if (same) follow(tv, v, tau, A);
        for (int64_t j = 0; j < A && !same; j++) tv[j] = tw[other[j]];
        if (tb) follow(tb + r, from[i].b + r, tau, 1);
      }
    }
  });
}

// The columns of a row that P_NM keeps, ascending. Magnitudes are compared as integers, which the bits of positive
// floats are in the same order as; NaN is the largest.
static void select(const float* w, int64_t C, int64_t n, int64_t m, int64_t* ids) {
  std::vector<int> magnitude(C);
  memcpy(magnitude.data(), w, 4 * C);
  for (int& bits : magnitude) bits &= 0x7fffffff;
  for (int64_t c = 0; c < C; c += m) {
    const int64_t end = min(c + m, C), kept = min(n, end - c);
    for (int64_t k = 0; k < kept; k++) {
      int64_t best = c;
      for (int64_t i = c + 1; i < end; i++) best = magnitude[i] > magnitude[best] ? i : best;
      magnitude[best] = -1, ids[k] = best;
    }
    std::sort(ids, ids + kept), ids += kept;
  }
}

// NMLinear.project; states: what the optimizer holds, with a dense master each.
int64_t project(const Tensor& values, const Tensor& index, const Tensor& master, const Tensor& layout,
                TensorList states, TensorList state_masters, int64_t n, int64_t m, const std::optional<Tensor>& given) {
  const int64_t R = values.size(0), A = values.size(1), C = master.size(1);
  const Layer l(R, A, C, layout.data_ptr<int>());
  TORCH_CHECK(l.size == layout.numel() && master.size(0) == R && states.size() == state_masters.size() &&
                  (!given || given->sizes() == index.sizes()),
              "the tensors of a layer differ in shape");
  TORCH_CHECK(1 <= n && n <= m && A == C / m * n + min(n, C % m), "values do not have the size of this N:M");
  const auto check = [](const Tensor& t, const Tensor& like) {
    TORCH_CHECK(t.is_contiguous() && t.sizes() == like.sizes(), "the tensors of a layer differ in shape");
    t.unsafeGetTensorImpl()->bump_version();
  };
  check(values, index), check(index, values), check(master, master);
  for (size_t s = 0; s < states.size(); s++) check(states[s], values), check(state_masters[s], master);
  float *v = values.data_ptr<float>(), *w = master.data_ptr<float>();
  const Tensor to = given ? given->contiguous() : index;
  if (given) check_index(to, C);
  int64_t *id = index.data_ptr<int64_t>(), *other = given ? to.data_ptr<int64_t>() : nullptr;
  std::atomic<int64_t> sad = 0;
  at::parallel_for(0, R, 16384 / C + 1, [&](int64_t r, int64_t last) {
    std::vector<int64_t> next(A);
    for (; r < last; r++) {
      int64_t *now = id + r * A, stayed = 0;
      for (int64_t j = 0; j < A; j++) w[r * C + now[j]] = v[r * A + j];
      if (other) std::copy_n(other + r * A, A, next.data());
      else select(w + r * C, C, n, m, next.data());
      if (std::equal(now, now + A, next.data())) continue;
      for (int64_t j = 0; j < A; j++) stayed += std::binary_search(now, now + A, next[j]);
      sad += 2 * (A - stayed);
      for (size_t s = 0; s < states.size(); s++) {
        float *state = states[s].data_ptr<float>() + r * A, *all = state_masters[s].data_ptr<float>() + r * C;
        for (int64_t j = 0; j < A; j++) all[now[j]] = state[j];
        for (int64_t j = 0; j < A; j++) state[j] = all[next[j]];
      }
      for (int64_t j = 0; j < A; j++) now[j] = next[j], v[r * A + j] = w[r * C + next[j]];
    }
  });
  if (sad) write_layout(l, id);
  return sad;
}

VECTORIZED adam(int64_t n, float* __restrict p, float* __restrict m, float* __restrict s, const float* __restrict g,
                float c1, float beta2, float c2, float rate, float correction, float eps) {
  for (int64_t i = 0; i < n; i++) {
    m[i] += c1 * (g[i] - m[i]);
    s[i] = beta2 * s[i] + c2 * g[i] * g[i];
    p[i] -= rate * m[i] / (std::sqrt(s[i]) / correction + eps);
  }
}
// A step of Adam after the sum of the gradients of all tiles, each of `size`. state: all parameters, both averages of
// each, and their counts of steps; options: learning rate, both betas, epsilon.
static void descend(float* dw, int64_t size, int64_t tiles, TensorList state, at::ArrayRef<double> options) {
  const double lr = options[0], beta1 = options[1], beta2 = options[2], eps = options[3];
  const size_t n = state.size() / 4;
  int64_t all = 0;
  for (size_t i = 0; i < 3 * n; i++)
    TORCH_CHECK(state[i].is_contiguous() && state[i].sizes() == state[i % n].sizes(), "state does not fit parameters");
  for (size_t i = 0; i < n; i++) {
    all += state[i].numel(), *state[3 * n + i].data_ptr<float>() += 1;
    state[i].unsafeGetTensorImpl()->bump_version();
  }
  TORCH_CHECK(all == size, "needs all parameters of the networks, biases too");
  for_shares([&](int64_t share, int64_t shares) {
    float* g = dw;
    for (size_t i = 0; i < n; g += state[i++].numel()) {
      const int64_t first = state[i].numel() * share / shares, last = state[i].numel() * (share + 1) / shares;
      const float step = *state[3 * n + i].data_ptr<float>();
      add_tiles(g + first, size, tiles, last - first);
      adam(last - first, state[i].data_ptr<float>() + first, state[n + i].data_ptr<float>() + first,
           state[2 * n + i].data_ptr<float>() + first, g + first, 1 - beta1, beta2, 1 - beta2,
           lr / (1 - std::pow(beta1, step)), std::sqrt(1 - std::pow(beta2, step)), eps);
    }
  });
}

// e^(-2 |x|) = 2^n e^f with |f| <= log(2) / 2, where a Taylor series is exact up to rounding.
INLINE vec tanh(vec x) {
  vec a = 2 * (x < 0.f ? x : -x), series = vec{} + 1;
  a = a < -40.f ? vec{} - 40 : a;
  const ivec n = __builtin_convertvector(a * 1.44269504f - 0.5f, ivec);
  const vec times = __builtin_convertvector(n, vec), f = a - times * 0.693359375f + times * 2.12194440e-4f;
  UNROLL
  for (int i = 7; i > 0; i--) series = 1 + series * f / float(i);
  const ivec power = (n + 127) << 23;
  const vec e = series * (vec)power, t = (1 - e) / (1 + e);
  return x < 0.f ? -t : t;
}
// Low, high, half the range and middle of each action.
static std::array<const float*, 4> checked(TensorList range, int64_t A) {
  for (const Tensor& t : range) TORCH_CHECK(t.is_contiguous() && t.numel() == A, "needs a number for each action");
  return {range[0].data_ptr<float>(), range[1].data_ptr<float>(), range[2].data_ptr<float>(),
          range[3].data_ptr<float>()};
}
// The rows of a batch: each may be a part of a longer one, such as those of a replay buffer.
struct Rows {
  Tensor tensor;
  const float* p;
  int64_t stride, B, C;
  Rows(const Tensor& t, int64_t B) : tensor(t.dim() == 1 || t.stride(1) == 1 ? t : t.contiguous()), B(B) {
    TORCH_CHECK(B > 0 && t.size(0) == B && t.is_cpu(), "batch empty, of different lengths, or not on the CPU");
    p = tensor.data_ptr<float>(), stride = tensor.stride(0), C = tensor.numel() / B;
  }
  void tile(int64_t s, float* to) const { turn<true>(p + s * stride, stride, B - s, C, to); }
};
Tensor act(const Tensor& obs, TensorList actor, TensorList action_range, double noise) {
  const Network net(obs.numel(), actor);
  const int64_t A = net.back().R;
  const auto range = checked(action_range, A);
  const Tensor action = noise > 0 ? at::randn({A}) : at::zeros({A}), x = obs.contiguous();
  const float* y = net.forward_sample(x.data_ptr<float>());
  float* to = action.data_ptr<float>();
  for (int64_t i = 0; i < A; i++) {
    const float clean = std::tanh(y[i]) * range[2][i] + range[3][i];
    to[i] = min(max(clean + to[i] * (range[2][i] * (float)noise), range[0][i]), range[1][i]);
  }
  return action;
}

// Returns the values of both critics before the step, and their target. state, options: see `descend`.
std::tuple<Tensor, Tensor, Tensor> update_critics(TensorList batch, TensorList action_range, TensorList actor_target,
                                                  TensorList qf1_target, TensorList qf2_target, TensorList qf1,
                                                  TensorList qf2, TensorList state, at::ArrayRef<double> options,
                                                  double policy_noise, double noise_clip, double gamma) {
  const int64_t B = batch[0].size(0), O = batch[0].size(1), A = batch[1].size(1), C = O + A;
  const Rows obs(batch[0], B), action(batch[1], B), next_obs(batch[2], B), reward(batch[3], B), terminated(batch[4], B);
  const Rows noise(at::randn_like(batch[1]), B);
  const auto range = checked(action_range, A);
  const Network policy(O, actor_target), targets[] = {{C, qf1_target}, {C, qf2_target}},
                                         critics[] = {{C, qf1}, {C, qf2}};
  const Tensor result[] = {at::empty({B}), at::empty({B}), at::empty({B})};
  const int64_t size = critics[0].parameters.back(), tiles = tiles_of(B);
  TORCH_CHECK(critics[1].parameters.back() == size && policy.back().R == A && action.C + next_obs.C == C &&
                  critics[1].outputs == targets[1].outputs && critics[1].outputs == targets[0].outputs &&
                  critics[0].back().R == 1 && critics[1].back().R == 1 && reward.C == 1 && terminated.C == 1,
              "networks and batch do not belong together");
  float *vt = scratch(2, 2 * size), *dw = scratch(3, tiles * 2 * size);
  for_shares([&](int64_t share, int64_t shares) {
    for (int c = 0; c < 2; c++) critics[c].transpose(vt + c * size, share, shares, false);
    for (int64_t t = tiles * share / shares; t < tiles * (share + 1) / shares; t++) {
      const int64_t s = t * TILE, n = min<int64_t>(TILE, B - s);
      float *x = scratch(0, (C + A + 2) * TILE), *next_action = x + O * TILE, *z = x + C * TILE;
      float *q1 = z + A * TILE, *q2 = q1 + TILE, *target = result[2].data_ptr<float>() + s;
      float* rest = scratch(1, max(policy.outputs.back(), targets[0].outputs.back()) * TILE);
      next_obs.tile(s, x), noise.tile(s, z);
      policy.forward(x, rest, next_action);
      for (int64_t i = 0; i < A * TILE; i += V) {
        const float low = range[0][i / TILE], high = range[1][i / TILE], scale = range[2][i / TILE];
        const vec smoothing = clamp(load(z + i) * (float)policy_noise, -noise_clip, noise_clip) * scale;
        const vec target_action = tanh(load(next_action + i)) * scale + range[3][i / TILE] + smoothing;
        store(next_action + i, clamp(target_action, low, high));
      }
      targets[0].forward(x, rest, q1), targets[1].forward(x, rest, q2);
      for (int64_t i = 0; i < n; i++) {
        const float next_q = q1[i] < q2[i] || q1[i] != q1[i] ? q1[i] : q2[i];  // a NaN comes through
        const float mask = 1 - terminated.p[(s + i) * terminated.stride];
        target[i] = reward.p[(s + i) * reward.stride] + mask * (float)gamma * next_q;
      }
    }
  });
  for_each(2 * tiles, [&](int64_t i) {
    const Network& net = critics[i % 2];
    const int64_t s = i / 2 * TILE, n = min<int64_t>(TILE, B - s);
    float *tape = scratch(1, (net.inputs.back() + net.outputs.back()) * TILE), *g = tape + net.inputs.back() * TILE;
    float* last_g = g + (net.outputs.back() - 1) * TILE;
    obs.tile(s, tape), action.tile(s, tape + O * TILE);
    net.forward(tape, tape + C * TILE, last_g);
    float *value = result[i % 2].data_ptr<float>() + s, *target = result[2].data_ptr<float>() + s;
    std::copy_n(last_g, n, value);
    for (int64_t j = 0; j < TILE; j++) last_g[j] = j < n ? (value[j] - target[j]) * (2.f / B) : 0;
    net.backward(tape, g, vt + i % 2 * size, dw + i * size, nullptr);
  });
  descend(dw, 2 * size, tiles, state, options);
  return {result[0], result[1], result[2]};
}

// Returns the loss before the step.
Tensor update_actor(const Tensor& obs_, TensorList action_range, TensorList actor, TensorList qf1, TensorList state,
                    at::ArrayRef<double> options) {
  const int64_t B = obs_.size(0), O = obs_.size(1);
  const Rows obs(obs_, B);
  const Network policy(O, actor);
  const int64_t A = policy.back().R, C = O + A, size = policy.parameters.back(), tiles = tiles_of(B);
  const Network critic(C, qf1);
  TORCH_CHECK(critic.back().R == 1, "networks and batch do not belong together");
  const auto range = checked(action_range, A);
  const Tensor values = at::empty({B});
  float *vt = scratch(2, size + critic.parameters.back()), *dw = scratch(3, tiles * size);
  for_shares([&](int64_t share, int64_t shares) {
    policy.transpose(vt, share, shares, false), critic.transpose(vt + size, share, shares, true);
  });
  for_each(tiles, [&](int64_t t) {
    const int64_t s = t * TILE, n = min<int64_t>(TILE, B - s);
    float *squashed = scratch(0, 2 * A * TILE), *dx = squashed + A * TILE;
    const int64_t width = policy.inputs.back() + policy.outputs.back(), q_width = critic.inputs.back();
    float *x = scratch(1, (width + q_width + critic.outputs.back()) * TILE), *g = x + policy.inputs.back() * TILE;
    float *q_x = x + width * TILE, *q_g = q_x + q_width * TILE, *last_q_g = q_g + (critic.outputs.back() - 1) * TILE;
    float* last_g = g + (policy.outputs.back() - A) * TILE;
    obs.tile(s, x);
    std::copy_n(x, O * TILE, q_x);
    policy.forward(x, x + O * TILE, squashed);
    for (int64_t i = 0; i < A * TILE; i += V) {
      store(squashed + i, tanh(load(squashed + i)));
      store(q_x + O * TILE + i, load(squashed + i) * range[2][i / TILE] + range[3][i / TILE]);
    }
    critic.forward(q_x, q_x + C * TILE, last_q_g);
    std::copy_n(last_q_g, n, values.data_ptr<float>() + s);
    for (int64_t i = 0; i < TILE; i++) last_q_g[i] = i < n ? -1.f / B : 0;
    critic.backward(q_x, q_g, vt + size, nullptr, dx, O);
    for (int64_t i = 0; i < A * TILE; i += V) {
      const vec squash = load(squashed + i);
      store(last_g + i, load(dx + i) * range[2][i / TILE] * (1 - squash * squash));
    }
    policy.backward(x, g, vt, dw + t * size, nullptr);
  });
  descend(dw, size, tiles, state, options);
  return -values.mean();
}

TORCH_LIBRARY(rnm_td3, m) {
  m.def("forward(Tensor x, Tensor[] layers) -> Tensor");
  m.def("mlp(Tensor x, Tensor[] layers) -> (Tensor y, Tensor tape)");
  m.def(
      "mlp_backward(Tensor grad, Tensor x, Tensor tape, Tensor[] layers, bool need_x, bool need_w) -> (Tensor, "
      "Tensor)");
  m.def("layout(Tensor index, int columns) -> Tensor"), m.def("act", act);
  // These write to what they are given, below autograd, and torch.compile does not know them.
  m.def("polyak", polyak), m.def("project", project);
  m.def("update_critics", update_critics), m.def("update_actor", update_actor);
}
TORCH_LIBRARY_IMPL(rnm_td3, CPU, m) {
  m.impl("forward", forward), m.impl("mlp", mlp), m.impl("mlp_backward", mlp_backward), m.impl("layout", layout);
}
