// The updates of reference.py for one contiguous CPU weight, compiled on first use by cpu.py: once for float32 and bfloat16
// weights, and with GRID_BITS defined for weights on a grid of so many bits.
//
// float32 arithmetic in the order of reference.py, without contraction to fused multiply-adds, so that given the same sums the
// stored weights are equal bit for bit. Sums are taken over fixed parts of a tensor and then in order, so that no result
// depends on the number of threads. Vectors are GCC's portable extension: AVX-512, AVX2 or NEON, whatever -march=native has.

#include "../../grid/blocks.h"

namespace {

constexpr float SMALLEST_RATIO = 0x1p-126f;  // as in reference

// Rounds to bfloat16 and stores; returns the stored values. `noise` is in [0, 65535]; NaN gets its usual pattern.
inline F16 round_and_store(bf16* p, F16 values, U16 noise) {
    U16 bits = ((U16)values + noise) & 0xFFFF0000u;
    bits = (values != values) ? U16{} + 0x7FC00000u : bits;
    H16 upper = narrow(bits >> 16);
    memcpy(p, &upper, sizeof upper);
    return (F16)bits;
}

// Stores 16 values whose global element index starts at a multiple of 16, given the hashes of their group of 32; returns what a
// load would give back.
template <bool STOCHASTIC>
inline F16 store(float* p, F16 values, U16, int) {
    memcpy(p, &values, sizeof values);
    return values;
}

template <bool STOCHASTIC>
inline F16 store(bf16* p, F16 values, U16 hash, int upper) {
    if (STOCHASTIC) return round_and_store(p, values, upper ? hash >> 16 : hash & 0xFFFFu);
    return round_and_store(p, values, 0x7FFFu + (((U16)values >> 16) & 1u));  // nearest, ties to even
}

// Walks a row of `count` elements from global index `origin`: whole aligned groups of 32 by `group(j)`, what lies before and
// after in pieces of at most 16 by `piece(j, n)`.
template <class P, class G>
inline INLINE void walk_row(int64_t count, int64_t origin, P piece, G group) {
    int64_t j = 0;
    auto pieces_to = [&](int64_t end) INLINE {
        while (j < end) {
            const int64_t n = std::min<int64_t>(LANES - ((origin + j) & 15), end - j);
            piece(j, n);
            j += n;
        }
    };
    pieces_to(std::min<int64_t>(count, -origin & 31));
    for (; j + 2 * LANES <= count; j += 2 * LANES) group(j);
    pieces_to(count);
}

// The first n values, moved to the lanes that global index `index` has in its group of 16; zeros elsewhere.
OUTLINE F16 to_lanes(F16 values, int64_t n, int64_t index) {
    float moved[2 * LANES] = {};
    memcpy(moved + (index & 15), &values, n * sizeof(float));
    return load(moved);
}

template <bool STOCHASTIC, class T>
OUTLINE F16 store_piece(T* to, F16 values, int64_t n, int64_t index, Key key) {
    T rounded[LANES];
    const U16 hash = hashes(((uint64_t)index >> 5) * 16, key);
    const F16 kept = store<STOCHASTIC>(rounded, to_lanes(values, n, index), hash, (index >> 4) & 1);
    memcpy(to, rounded + (index & 15), n * sizeof(T));
    return kept;
}

// Stores `values_at(j, n)`, the n <= 16 new values from element j on, for a whole row; returns the sum of their squares.
template <bool STOCHASTIC, class T, class F>
inline INLINE double store_row_as(T* row, int64_t count, int64_t origin, Key key, F values_at) {
    F16 total = {};
    auto piece = [&](int64_t j, int64_t n) INLINE {
        const F16 kept = store_piece<STOCHASTIC>(row + j, values_at(j, n), n, origin + j, key);
        total += kept * kept;
    };
    auto group = [&](int64_t j) INLINE {
        const U16 hash = hashes(((uint64_t)(origin + j) >> 5) * 16, key);
        const F16 low = store<STOCHASTIC>(row + j, values_at(j, LANES), hash, 0);
        const F16 high = store<STOCHASTIC>(row + j + LANES, values_at(j + LANES, LANES), hash, 1);
        total += low * low + high * high;
    };
    walk_row(count, origin, piece, group);
    return sum(total);
}

template <class T, class F>
inline INLINE double store_row(T* row, int64_t count, int64_t origin, Key key, F values_at) {
    return key.stochastic ? store_row_as<true>(row, count, origin, key, values_at)
                          : store_row_as<false>(row, count, origin, key, values_at);
}

// The same sum over values that are stored already, in the same order.
template <class T>
inline double square_sum_of_row(const T* row, int64_t count, int64_t origin) {
    F16 total = {};
    auto piece = [&](int64_t j, int64_t n) INLINE {
        const F16 v = to_lanes(load_any(row + j, n), n, origin + j);
        total += v * v;
    };
    auto group = [&](int64_t j) INLINE {
        const F16 low = load(row + j), high = load(row + j + LANES);
        total += low * low + high * high;
    };
    walk_row(count, origin, piece, group);
    return sum(total);
}

// How a weight is stored: its squares, and its new values

struct Motion {
    float step, shrink, decay;  // shrink is 1 - decay, rounded on its own
    Key key;
};

template <class T>
struct Dense {
    T* data;

    static int64_t size_bytes(int64_t count) { return count * (int64_t)sizeof(T); }

    void prefetch(int64_t origin, int64_t count) const {
        for (int64_t j = 0; j < count; j += 64 / sizeof(T)) __builtin_prefetch(data + origin + j, 1);
    }

    // Sum of the squares of `count` elements from `origin` on, whose global index is `index`.
    double square_sum(int64_t origin, int64_t count, int64_t index) const {
        return square_sum_of_row(data + origin, count, index);
    }

    // Moves these elements against `direction(j, n)`, the n <= 16 values from the j-th on, which is asked once for each;
    // returns the sum of the squares of the new values.
    template <class D>
    INLINE double move(int64_t origin, int64_t count, int64_t index, const Motion& motion, D direction) const {
        T* w = data + origin;
        const F16 shrink = splat(motion.shrink), by = splat(motion.step);
        return store_row(w, count, index, motion.key, [=](int64_t j, int64_t n) INLINE {
            return load_any(w + j, n) * shrink - direction(j, n) * by;
        });
    }
};

template <int BITS>
struct OnGrid {
    Planes planes;

    static int64_t size_bytes(int64_t count) { return count * BITS / 8; }

    void prefetch(int64_t origin, int64_t count) const {
        const int64_t bytes = BITS == 4 ? count / 2 : count;
        for (int64_t j = 0; j < bytes; j += 64) __builtin_prefetch(planes.codes + (BITS == 4 ? origin / 2 : origin) + j, 1);
        for (int64_t j = 0; BITS == 12 && j < count / 2; j += 64) __builtin_prefetch(planes.low + origin / 2 + j, 1);
    }

    double square_sum(int64_t origin, int64_t count, int64_t) const {
        switch (planes.block) {
            case GROUP: return square_sum_as<1>(origin, count);
            case 2 * GROUP: return square_sum_as<2>(origin, count);
            default: return square_sum_as<4>(origin, count);
        }
    }

    template <int GROUPS>
    double square_sum_as(int64_t origin, int64_t count) const {
        F16 total = {};
        for (int64_t at = origin; at < origin + count; at += GROUPS * GROUP)
            add_squares<BITS, GROUPS>({planes.codes, planes.low}, planes.scales[at / (GROUPS * GROUP)], at, total);
        return sum(total);
    }

    template <class D>
    INLINE double move(int64_t origin, int64_t count, int64_t index, const Motion& motion, D direction) const {
        switch (planes.block) {
            case GROUP: return move_as<1>(origin, count, index, motion, direction);
            case 2 * GROUP: return move_as<2>(origin, count, index, motion, direction);
            default: return move_as<4>(origin, count, index, motion, direction);
        }
    }

    template <int GROUPS, class D>
    INLINE double move_as(int64_t origin, int64_t count, int64_t index, const Motion& motion, D direction) const {
        constexpr int BLOCKS = 4 / GROUPS;
        F16 total = {};
        int64_t j = 0;
        for (; j + 4 * GROUP <= count; j += 4 * GROUP) move_some<GROUPS, BLOCKS>(origin, j, index, motion, total, direction);
        for (; j < count; j += GROUPS * GROUP) move_some<GROUPS, 1>(origin, j, index, motion, total, direction);
        return sum(total);
    }

    template <int GROUPS, int BLOCKS, class D>
    INLINE void move_some(int64_t origin, int64_t j, int64_t index, const Motion& motion, F16& total, D direction) const {
        move_blocks<BITS, GROUPS, BLOCKS>({planes.codes, planes.low}, planes.scales + (origin + j) / (GROUPS * GROUP),
                                          planes.largest, origin + j, index + j, motion.step, motion.decay, motion.key, total,
                                          [=](int64_t k) INLINE { return direction(j + k, LANES); });
    }
};

// A (B, R, C) gradient of any strides. Rows that are not contiguous are gathered into a buffer, several at a time so that a
// transposed gradient is read along its own rows.
template <class G>
struct Gradient {
    const G* data;
    int64_t stack_stride, row_stride, column_stride;

    static constexpr int ROWS = 8;  // rows that are handed out at once

    // Rows r .. r + n of matrix b; `buffer` holds ROWS * columns values and is used where rows are not contiguous.
    void rows(int64_t b, int64_t r, int n, int64_t columns, G* buffer, const G** out) const {
        const G* base = data + b * stack_stride + r * row_stride;
        for (int i = 0; i < n; i++) out[i] = column_stride == 1 ? base + i * row_stride : buffer + i * columns;
        if (column_stride == 1) return;
        for (int64_t c = 0; c < columns; c++)
            for (int i = 0; i < n; i++) buffer[i * columns + c] = base[i * row_stride + c * column_stride];
    }
};

template <class T>
constexpr int64_t CACHE_LINE = 64 / sizeof(T);

// Fixed parts of a tensor

struct Parts {
    int64_t per_matrix, rows_each, total;

    // Up to 64 runs of rows (multiples of 8) a matrix, fewer where the column sums of all would outgrow `column_budget`.
    static Parts of_matrices(int64_t stack, int64_t rows, int64_t columns, int64_t column_budget) {
        int64_t most = std::max<int64_t>(1, std::min<int64_t>(64, column_budget / (4 * columns * stack)));
        int64_t wanted = std::min(most, std::max<int64_t>(1, rows * columns / 16384));
        int64_t rows_each = ((rows + wanted - 1) / wanted + 7) / 8 * 8;
        int64_t per_matrix = (rows + rows_each - 1) / rows_each;
        return {per_matrix, rows_each, per_matrix * stack};
    }
};

struct Scratch {  // zeroed memory that goes with its owner
    char* data;
    explicit Scratch(size_t bytes) : data((char*)calloc(bytes ? bytes : 1, 1)) {}
    ~Scratch() { free(data); }
    template <class T>
    T* take(size_t count) {
        T* here = (T*)(data + used);
        used += (count * sizeof(T) + 63) / 64 * 64;
        return here;
    }
    size_t used = 0;
};

inline double ordered_sum(const double* values, int64_t count) {
    double total = 0;
    for (int64_t i = 0; i < count; i++) total += values[i];
    return total;
}

inline void average(float* value, float target, float weight) { *value += (target - *value) * weight; }

float step_size(float lr, int relative, float clip_threshold, double count, double update_sum, double weight_sum) {
    float clip = std::max(std::sqrt((float)update_sum / (float)count) / clip_threshold, 1.0f);
    float step = lr;
    if (relative) step *= std::max(std::sqrt((float)weight_sum / (float)count), 1e-3f);
    return step / clip;
}

// What part of a parameter the tensors are. `sum` replaces numbers by their sums over all ranks; called by the thread that
// called us, since it may run Python. Null where the tensors are all of the parameter.
struct Shard {
    void (*sum)(double* values, int64_t count);
    int64_t offset;         // global index of the first element
    int64_t rows;           // of the whole, where the rows of one matrix lie on several ranks; else as here
    int64_t columns;        // of the whole, where a row lies on several ranks; else as here
    int64_t count;          // elements of the whole
    int32_t rows_split;     // whether the rows of one matrix do
    int32_t columns_split;  // whether a row does; not both

    // Global index of the first element of a run, which is a row where a row lies on several ranks.
    int64_t global(int64_t origin, int64_t columns_here) const {
        return offset + (columns_split ? origin / columns_here * columns : origin);
    }
};

struct Settings {
    double average_weight, lr, clip_threshold, eps, weight_decay;
    int32_t relative_step, threads;
    Key key;
    Shard shard;

    Motion motion(float step) const {
        return {step, (float)(1.0 - lr * weight_decay), (float)(lr * weight_decay), key};
    }
};

float global_step_size(const Settings& s, double update_sum, double weight_sum) {
    double both[2] = {update_sum, weight_sum};
    if (s.shard.sum) s.shard.sum(both, 2);
    return step_size((float)s.lr, s.relative_step, (float)s.clip_threshold, (double)s.shard.count, both[0], both[1]);
}

double global_sum(const Settings& s, double value) {
    if (s.shard.sum) s.shard.sum(&value, 1);
    return (float)value;
}

// One matrix or a stack of them, second moment factored

// Runs of a gradient's rows that have any entry, from a table of them; the others are zeros.
template <class G>
struct SomeRows {
    const G* data;         // (entries, columns)
    const int32_t* place;  // of each row in `data`; -1 where it has none
    const G* zeros;        // columns of them
    bool decays;           // whether rows of zeros move as well

    static constexpr int ROWS = Gradient<G>::ROWS;
    static constexpr int64_t column_stride = 1;

    void rows(int64_t, int64_t r, int n, int64_t columns, G*, const G** out) const {
        for (int i = 0; i < n; i++) out[i] = place[r + i] < 0 ? zeros : data + place[r + i] * columns;
    }
    bool moves(int64_t r) const { return decays || place[r] >= 0; }
    bool any(int64_t r, int n) const {
        for (int i = 0; i < n; i++)
            if (place[r + i] >= 0) return true;
        return false;
    }
};

template <class G>
bool any(const SomeRows<G>& grad, int64_t r, int n) { return grad.any(r, n); }
template <class G>
bool any(const Gradient<G>&, int64_t, int) { return true; }
template <class G>
bool moves(const SomeRows<G>& grad, int64_t r) { return grad.moves(r); }
template <class G>
constexpr bool moves(const Gradient<G>&, int64_t) { return true; }

// The update in phases. Each but the short ones in between works part by part, so that a gradient may exist in parts only:
// `sum_part` for all, `add_columns` for all columns, `finish_sums`, `factors`, `square_part` for all, `choose_step`, and
// `move_part` for all.
template <class W, class G>
struct Factored {
    static constexpr int ROWS = Gradient<G>::ROWS;

    W weight;
    int64_t stack, rows, columns;
    float *row, *column, *mass;
    double known_sum;  // of the squared weights; negative if unknown
    Settings s;
    int64_t count;
    Parts parts;
    int64_t shared;
    Scratch scratch;
    float *column_parts, *row_factor, *column_factor;  // the factors hold the sums first
    double *sums, *update_sums, *weight_sums, *message, *row_totals;
    double grad_sum = 0;
    float step = 0;
    bool prefetch_weight;

    Factored(W weight, int64_t stack, int64_t rows, int64_t columns, float* row, float* column, float* mass,
             double known_sum, const Settings& s)
        : weight(weight), stack(stack), rows(rows), columns(columns), row(row), column(column), mass(mass),
          known_sum(known_sum), s(s), count(stack * rows * columns),
          parts(Parts::of_matrices(stack, rows, columns, std::max<int64_t>(512 << 10, W::size_bytes(count) / 200))),
          shared(s.shard.sum ? stack * (s.shard.columns_split ? rows : columns) + 2 : 0),
          scratch(parts.total * (columns * 4 + 3 * 8 + 512) + stack * (rows + columns) * 4 * 2 + (shared + stack) * 8 + 1024) {
        column_parts = scratch.template take<float>(parts.total * columns);
        sums = scratch.template take<double>(parts.total);
        update_sums = scratch.template take<double>(parts.total);
        weight_sums = scratch.template take<double>(parts.total);
        row_factor = scratch.template take<float>(stack * rows);
        column_factor = scratch.template take<float>(stack * columns);
        message = scratch.template take<double>(shared);
        row_totals = scratch.template take<double>(stack);
        // Where gradient and weight fit in the second-level caches, the weight is fetched while the squared update is summed.
        prefetch_weight = W::size_bytes(count) + count * (int64_t)sizeof(G) <= s.threads * (int64_t)(3 << 19);
    }

    // Calls `run(b, r, n)` for rows r .. r + n of matrix b, all that are in a part.
    template <class F>
    INLINE void for_rows(int64_t p, F run) const {
        const int64_t b = p / parts.per_matrix, begin = p % parts.per_matrix * parts.rows_each;
        const int64_t end = std::min(begin + parts.rows_each, rows);
        for (int64_t r = begin; r < end; r += ROWS) run(b, r, (int)std::min<int64_t>(ROWS, end - r));
    }

    // Sums of the squared gradient over rows and columns, one read.
    template <class S>
    void sum_part(int64_t p, const S& grad, G* buffer) {
        const int64_t columns = this->columns, rows = this->rows;
        float *columns_here = column_parts + p * columns, *row_sums = row_factor;
        double part_sum = 0;
        for_rows(p, [&](int64_t b, int64_t r, int n) INLINE {
            if (!any(grad, r, n)) return;  // the sums of its rows are zero already
            const G* g[ROWS];
            grad.rows(b, r, n, columns, buffer, g);
            F16 row_total[ROWS] = {};
            auto add = [&](int64_t c, int64_t width, int rows_now) INLINE {
                F16 column_total = {};
                for (int i = 0; i < rows_now; i++) {
                    F16 v = load_any(g[i] + c, width);
                    v *= v;
                    row_total[i] += v;
                    column_total += v;
                }
                column_total += load_any(columns_here + c, width);
                memcpy(columns_here + c, &column_total, std::min<int64_t>(width, LANES) * sizeof(float));
            };
            int64_t c = 0;
            if (n == ROWS)
                for (; c + LANES <= columns; c += LANES) {
                    add(c, LANES, ROWS);
                    // The next rows: eight short streams side by side are too many for the hardware's prefetcher.
                    for (int i = 0; i < ROWS && c % CACHE_LINE<G> == 0; i++) __builtin_prefetch(g[i] + c + ROWS * columns);
                }
            for (; c < columns; c += LANES) add(c, columns - c, n);
            for (int i = 0; i < n; i++) {
                row_sums[b * rows + r + i] = sum(row_total[i]);
                part_sum += row_sums[b * rows + r + i];
            }
        });
        sums[p] = part_sum;
    }

    void add_columns(int64_t i) {
        const float* from = column_parts + i / columns * parts.per_matrix * columns + i % columns;
        float total = 0;
        for (int64_t p = 0; p < parts.per_matrix; p++) total += from[p * columns];
        column_factor[i] = total;
    }

    // Sums over ranks, and whether the gradient is finite.
    bool finish_sums() {
        const Shard& shard = s.shard;
        grad_sum = (float)ordered_sum(sums, parts.total);
        if (shard.sum) {
            const int64_t split = shard.rows_split ? stack * columns : shard.columns_split ? stack * rows : 0;
            float* sums_here = shard.columns_split ? row_factor : column_factor;
            for (int64_t i = 0; i < split; i++) message[i] = sums_here[i];
            message[split] = grad_sum;
            shard.sum(message, split + 1);
            for (int64_t i = 0; i < split; i++) sums_here[i] = (float)message[i];
            grad_sum = (float)message[split];
        }
        return std::isfinite(grad_sum);
    }

    // The averages, and what a gradient is multiplied with.
    void factors() {
        const Shard& shard = s.shard;
        const float w_average = (float)s.average_weight, eps = (float)s.eps;
        average(mass, 1.0f, w_average);
        for (int64_t i = 0; i < stack * columns; i++) {
            average(column + i, column_factor[i] / (float)shard.rows + eps, w_average);
            column_factor[i] = 1.0f / std::sqrt(column[i] / *mass);
        }
        for (int64_t b = 0; b < stack; b++) {
            for (int64_t r = b * rows; r < (b + 1) * rows; r++) {
                average(row + r, row_factor[r] / (float)shard.columns + eps, w_average);
                row_totals[b] += row[r];
            }
        }
        if (shard.sum && shard.rows_split) shard.sum(row_totals, stack);
        for (int64_t b = 0; b < stack; b++) {
            const float mean = (float)(row_totals[b] / (double)shard.rows);
            for (int64_t r = b * rows; r < (b + 1) * rows; r++) {
                row_factor[r] = 1.0f / std::sqrt(std::max(row[r] / mean, SMALLEST_RATIO));
            }
        }
    }

    // Sum of the squared update, and of the weights where the last update did not leave it.
    template <class S>
    void square_part(int64_t p, const S& grad, G* buffer) {
        const int64_t columns = this->columns, rows = this->rows;
        const bool measures = s.relative_step && known_sum < 0, prefetches = prefetch_weight;
        const float *row_factor = this->row_factor, *column_factor = this->column_factor;
        double update_sum = 0, weight_sum = 0;
        for_rows(p, [&](int64_t b, int64_t r, int n) INLINE {
            const float* cf = column_factor + b * columns;
            const bool has_entries = any(grad, r, n);
            if (!has_entries && !measures) return;
            const G* g[ROWS];
            grad.rows(b, r, n, columns, buffer, g);
            F16 total[4] = {};
            for (int i = 0; i < n; i++) {
                const F16 rf = splat(row_factor[b * rows + r + i]);
                if (prefetches) weight.prefetch((b * rows + r + i) * columns, columns);
                int64_t c = 0;
                for (; has_entries && c + 4 * LANES <= columns; c += 4 * LANES)
                    for (int k = 0; k < 4; k++) {
                        F16 u = load(g[i] + c + k * LANES) * rf * load(cf + c + k * LANES);
                        total[k] += u * u;
                    }
                for (; has_entries && c < columns; c += LANES) {
                    F16 u = load_any(g[i] + c, columns - c) * rf * load_any(cf + c, columns - c);
                    total[0] += u * u;
                }
                if (measures) {
                    const int64_t origin = (b * rows + r + i) * columns;
                    weight_sum += weight.square_sum(origin, columns, s.shard.global(origin, columns));
                }
            }
            update_sum += sum(total[0] + total[1] + (total[2] + total[3]));
        });
        update_sums[p] = update_sum;
        weight_sums[p] = weight_sum;
    }

    void choose_step() {
        if (known_sum < 0) known_sum = ordered_sum(weight_sums, parts.total);
        step = global_step_size(s, ordered_sum(update_sums, parts.total), known_sum);
    }

    // The new weights, rounded, and their sum of squares.
    template <class S>
    void move_part(int64_t p, const S& grad, G* buffer) {
        const int64_t columns = this->columns, rows = this->rows;
        const Motion motion = s.motion(step);
        const float *row_factor = this->row_factor, *column_factor = this->column_factor;
        double weight_sum = 0;
        for_rows(p, [&](int64_t b, int64_t r, int n) INLINE {
            const float* cf = column_factor + b * columns;
            const G* g[ROWS];
            grad.rows(b, r, n, columns, buffer, g);
            for (int i = 0; i < n; i++) {
                const int64_t origin = (b * rows + r + i) * columns;
                const F16 rf = splat(row_factor[b * rows + r + i]);
                const G* gi = g[i];
                const int64_t index = s.shard.global(origin, columns);
                if (!moves(grad, r + i)) {
                    if (s.relative_step) weight_sum += weight.square_sum(origin, columns, index);
                    continue;
                }
                weight_sum += weight.move(origin, columns, index, motion, [=](int64_t c, int64_t m) INLINE {
                    return load_any(gi + c, m) * rf * load_any(cf + c, m);
                });
            }
        });
        weight_sums[p] = weight_sum;
    }

    double new_weight_sum() const { return s.relative_step ? ordered_sum(weight_sums, parts.total) : -1.0; }
};

template <class W, class G>
double adafactor_factored(W weight, const Gradient<G>& grad, int64_t stack, int64_t rows, int64_t columns, float* row,
                          float* column, float* mass, double* weight_sum, const Settings& s) {
    Factored<W, G> work(weight, stack, rows, columns, row, column, mass, *weight_sum, s);
    const bool gathered = grad.column_stride != 1;
    bool usable = false;

#pragma omp parallel num_threads(s.threads)
    {
        G* buffer = gathered ? (G*)malloc(Gradient<G>::ROWS * columns * sizeof(G)) : nullptr;
#pragma omp for schedule(static)
        for (int64_t p = 0; p < work.parts.total; p++) work.sum_part(p, grad, buffer);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < stack * columns; i++) work.add_columns(i);
#pragma omp master
        {
            usable = work.finish_sums();
            if (usable) work.factors();
        }
#pragma omp barrier
        if (usable) {
#pragma omp for schedule(static)
            for (int64_t p = 0; p < work.parts.total; p++) work.square_part(p, grad, buffer);
#pragma omp master
            work.choose_step();
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t p = 0; p < work.parts.total; p++) work.move_part(p, grad, buffer);
        }
        free(buffer);
    }
    if (usable) *weight_sum = work.new_weight_sum();
    return work.grad_sum;
}

// The same update of one matrix, called phase by phase, whose gradient is there for a few parts at a time.
struct Slices {
    int64_t parts_total = 0, rows_each = 0;
    virtual ~Slices() {}
    // Of parts first .. last: either their rows, or a table of some rows of the whole gradient.
    virtual void sums(int64_t first, int64_t last, const void* grad, const int32_t* place) = 0;
    virtual void squares(int64_t first, int64_t last, const void* grad, const int32_t* place) = 0;
    virtual void moves(int64_t first, int64_t last, const void* grad, const int32_t* place) = 0;
    virtual double factors() = 0;  // the sum of the squared gradient; nothing is changed if it is not finite
    virtual void choose_step() = 0;
    virtual double new_weight_sum() = 0;
};

template <class W, class G>
struct SlicesOf final : Slices {
    Factored<W, G> work;
    Scratch zeros;

    SlicesOf(W weight, int64_t rows, int64_t columns, float* row, float* column, float* mass, double known_sum,
             const Settings& s)
        : work(weight, 1, rows, columns, row, column, mass, known_sum, s), zeros((columns + 64) * sizeof(G)) {
        parts_total = work.parts.total;
        rows_each = work.parts.rows_each;
        work.prefetch_weight = false;
    }

    template <class F>
    void for_parts(int64_t first, int64_t last, const void* grad, const int32_t* place, F run) {
        const int64_t columns = work.columns;
        const G* data = (const G*)grad;
        if (place) {
            const SomeRows<G> some{data, place, (const G*)zeros.data, work.s.weight_decay != 0};
#pragma omp parallel for schedule(static) num_threads(work.s.threads)
            for (int64_t p = first; p < last; p++) run(p, some);
            return;
        }
        const Gradient<G> whole{data - first * work.parts.rows_each * columns, 0, columns, 1};
#pragma omp parallel for schedule(static) num_threads(work.s.threads)
        for (int64_t p = first; p < last; p++) run(p, whole);
    }

    void sums(int64_t first, int64_t last, const void* grad, const int32_t* place) override {
        for_parts(first, last, grad, place, [&](int64_t p, const auto& g) { work.sum_part(p, g, nullptr); });
    }
    void squares(int64_t first, int64_t last, const void* grad, const int32_t* place) override {
        for_parts(first, last, grad, place, [&](int64_t p, const auto& g) { work.square_part(p, g, nullptr); });
    }
    void moves(int64_t first, int64_t last, const void* grad, const int32_t* place) override {
        for_parts(first, last, grad, place, [&](int64_t p, const auto& g) { work.move_part(p, g, nullptr); });
    }
    double factors() override {
        for (int64_t i = 0; i < work.columns; i++) work.add_columns(i);
        if (work.finish_sums()) work.factors();
        return work.grad_sum;
    }
    void choose_step() override { work.choose_step(); }
    double new_weight_sum() override { return work.new_weight_sum(); }
};

// Updates with a state per element

// Calls `run(first, count, origin, grad_row)` in parallel over runs of consecutive elements, single rows if `by_rows`; the runs
// depend on the shape alone.
template <class G, class F>
void for_runs(const Gradient<G>& grad, int64_t stack, int64_t rows, int64_t columns, int threads, bool by_rows, F run) {
    const bool flat = !by_rows && grad.column_stride == 1 && (rows == 1 || grad.row_stride == columns) &&
                      (stack == 1 || grad.stack_stride == rows * columns);
    const int64_t count = stack * rows * columns, length = 32768;
    if (flat) {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t p = 0; p < (count + length - 1) / length; p++)
            run(p, std::min(length, count - p * length), p * length, grad.data + p * length);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        G* buffer = (G*)malloc(columns * sizeof(G));
#pragma omp for schedule(static)
        for (int64_t r = 0; r < stack * rows; r++) {
            const G* g;
            grad.rows(r / rows, r % rows, 1, columns, buffer, &g);
            run(r, columns, r * columns, g);
        }
        free(buffer);
    }
}

inline int64_t run_count(int64_t stack, int64_t rows, int64_t columns) {
    return std::max(stack * rows, (stack * rows * columns + 32767) / 32768);
}

template <class G>
double square_sum(const Gradient<G>& grad, int64_t stack, int64_t rows, int64_t columns, int threads, bool by_rows, double* sums) {
    for_runs(grad, stack, rows, columns, threads, by_rows, [&](int64_t p, int64_t n, int64_t, const G* g) {
        F16 total[2] = {};
        int64_t j = 0;
        for (; j + 2 * LANES <= n; j += 2 * LANES)
            for (int k = 0; k < 2; k++) {
                F16 v = load(g + j + k * LANES);
                total[k] += v * v;
            }
        for (; j < n; j += LANES) {
            F16 v = load_any(g + j, n - j);
            total[0] += v * v;
        }
        sums[p] = sum(total[0] + total[1]);
    });
    return (float)ordered_sum(sums, run_count(stack, rows, columns));
}

template <class W, class G>
double adafactor_full(W weight, const Gradient<G>& grad, int64_t stack, int64_t rows, int64_t columns, float* moment,
                      float* mass, double* weight_sum, const Settings& s) {
    const int64_t runs = run_count(stack, rows, columns);
    Scratch scratch(2 * (runs * 8 + 64));
    double *sums = scratch.take<double>(runs), *weight_sums = scratch.take<double>(runs);
    const bool by_rows = s.shard.columns_split;
    const double grad_sum = global_sum(s, square_sum(grad, stack, rows, columns, s.threads, by_rows, sums));
    if (!std::isfinite(grad_sum)) return grad_sum;
    average(mass, 1.0f, (float)s.average_weight);
    const F16 w_average = splat((float)s.average_weight), eps = splat((float)s.eps), by_mass = splat(*mass);
    const bool know = !s.relative_step || *weight_sum >= 0;
    for_runs(grad, stack, rows, columns, s.threads, by_rows, [&](int64_t p, int64_t n, int64_t origin, const G* g) {
        float* v = moment + origin;
        F16 total = {};
        for (int64_t j = 0; j < n; j += LANES) {
            const int64_t m = std::min<int64_t>(LANES, n - j);
            const F16 gradient = load_any(g + j, m);
            F16 value = load_any(v + j, m);
            value += (gradient * gradient + eps - value) * w_average;
            memcpy(v + j, &value, m * sizeof(float));
            F16 u = gradient / root(value / by_mass);
            if (m < LANES) u = load_part((float*)&u, m);
            total += u * u;
        }
        sums[p] = sum(total);
        if (!know) weight_sums[p] = weight.square_sum(origin, n, s.shard.global(origin, columns));
    });
    if (!know) *weight_sum = ordered_sum(weight_sums, runs);
    const Motion motion = s.motion(global_step_size(s, ordered_sum(sums, runs), *weight_sum));
    for_runs(grad, stack, rows, columns, s.threads, by_rows, [&](int64_t p, int64_t n, int64_t origin, const G* g) {
        const float* v = moment + origin;
        const int64_t index = s.shard.global(origin, columns);
        weight_sums[p] = weight.move(origin, n, index, motion, [=](int64_t j, int64_t m) INLINE {
            return load_any(g + j, m) / root(load_any(v + j, m) / by_mass);
        });
    });
    *weight_sum = s.relative_step ? ordered_sum(weight_sums, runs) : -1.0;
    return grad_sum;
}

template <class W, class G>
double adamw(W weight, const Gradient<G>& grad, int64_t stack, int64_t rows, int64_t columns, float* first,
             float* second, float* first_mass, float* second_mass, double first_weight, const Settings& s) {
    Scratch scratch(run_count(stack, rows, columns) * 8 + 64);
    double* sums = scratch.take<double>(run_count(stack, rows, columns));
    const bool by_rows = s.shard.columns_split;
    const double grad_sum = global_sum(s, square_sum(grad, stack, rows, columns, s.threads, by_rows, sums));
    if (!std::isfinite(grad_sum)) return grad_sum;
    average(first_mass, 1.0f, (float)first_weight);
    average(second_mass, 1.0f, (float)s.average_weight);
    const F16 w1 = splat((float)first_weight), w2 = splat((float)s.average_weight), eps = splat((float)s.eps);
    const F16 mass1 = splat(*first_mass), mass2 = splat(*second_mass);
    const Motion motion = s.motion((float)s.lr);
    for_runs(grad, stack, rows, columns, s.threads, by_rows, [&](int64_t, int64_t n, int64_t origin, const G* g) {
        float *m1 = first ? first + origin : nullptr, *m2 = second + origin;
        weight.move(origin, n, s.shard.global(origin, columns), motion, [=](int64_t j, int64_t m) INLINE {
            const F16 gradient = load_any(g + j, m);
            F16 v = load_any(m2 + j, m), mean = gradient;
            v += (gradient * gradient - v) * w2;
            memcpy(m2 + j, &v, m * sizeof(float));
            if (m1) {
                mean = load_any(m1 + j, m);
                mean += (gradient - mean) * w1;
                memcpy(m1 + j, &mean, m * sizeof(float));
                mean = mean / mass1;
            }
            return mean / (root(v / mass2) + eps);
        });
    });
    return grad_sum;
}

template <class W, class G>
double sgd(W weight, const Gradient<G>& grad, int64_t stack, int64_t rows, int64_t columns, float* momentum,
           float* mass, const Settings& s) {
    Scratch scratch(run_count(stack, rows, columns) * 8 + 64);
    double* sums = scratch.take<double>(run_count(stack, rows, columns));
    const bool by_rows = s.shard.columns_split;
    const double grad_sum = global_sum(s, square_sum(grad, stack, rows, columns, s.threads, by_rows, sums));
    if (!std::isfinite(grad_sum)) return grad_sum;
    if (momentum) average(mass, 1.0f, (float)s.average_weight);
    const F16 by_mass = splat(momentum ? *mass : 1.0f), w_average = splat((float)s.average_weight);
    const Motion motion = s.motion((float)s.lr);
    for_runs(grad, stack, rows, columns, s.threads, by_rows, [&](int64_t, int64_t n, int64_t origin, const G* g) {
        float* m1 = momentum ? momentum + origin : nullptr;
        weight.move(origin, n, s.shard.global(origin, columns), motion, [=](int64_t j, int64_t m) INLINE {
            F16 u = load_any(g + j, m);
            if (m1) {
                F16 mean = load_any(m1 + j, m);
                mean += (u - mean) * w_average;
                memcpy(m1 + j, &mean, m * sizeof(float));
                u = mean / by_mass;
            }
            return u;
        });
    });
    return grad_sum;
}

}  // namespace

// What cpu.py calls.

extern "C" {

struct Call {  // packed by cpu.py
    void* weight;
    const void* grad;
    float *row, *column, *first, *second, *mass, *second_mass;
    void (*sum)(double*, int64_t);
    int64_t stack, rows, columns, stack_stride, row_stride, column_stride, offset, all_rows, all_columns, all_count;
    double weight_sum, average_weight, first_weight, lr, clip_threshold, eps, weight_decay;
    int32_t is_bf16, relative_step, threads, stochastic, rows_split, columns_split;
    uint32_t key_first, key_second;
};

static Settings settings(const Call& c) {
    return {c.average_weight, c.lr, c.clip_threshold, c.eps, c.weight_decay, c.relative_step, c.threads,
            {c.key_first, c.key_second, c.stochastic != 0},
            {c.sum, c.offset, c.all_rows, c.all_columns, c.all_count, c.rows_split, c.columns_split}};
}

// `weight` points to the values, or on a grid to a `Planes`; `is_bf16` says what the gradient is, and a weight of values too.
#ifdef GRID_BITS
#define WEIGHT(G) OnGrid<GRID_BITS>{*(const Planes*)c->weight}
#else
#define WEIGHT(G) Dense<G>{(G*)c->weight}
#endif
#define FOR_DTYPES(CALL) \
    if (c->is_bf16) { CALL(bf16) } else { CALL(float) }
#define GRADIENT(G) Gradient<G>{(const G*)c->grad, c->stack_stride, c->row_stride, c->column_stride}

double sbft_adafactor_factored(Call* c) {
#define CALL(G)                                                                                                        \
    return adafactor_factored(WEIGHT(G), GRADIENT(G), c->stack, c->rows, c->columns, c->row, c->column, c->mass,   \
                              &c->weight_sum, settings(*c));
    FOR_DTYPES(CALL)
#undef CALL
}

// Begins an update of a matrix whose gradient is there in slices of its rows; `sbft_slices_end` ends it. Writes the number of
// parts and the rows of each.
void* sbft_slices_begin(Call* c, int64_t* parts_and_rows) {
    Slices* slices = nullptr;
#define CALL(G)                                                                                                       \
    {                                                                                                                 \
        const auto weight = WEIGHT(G);                                                                                \
        slices = new SlicesOf<decltype(WEIGHT(G)), G>(weight, c->rows, c->columns, c->row, c->column, c->mass,        \
                                                      c->weight_sum, settings(*c));                                   \
    }
    FOR_DTYPES(CALL)
#undef CALL
    parts_and_rows[0] = slices->parts_total;
    parts_and_rows[1] = slices->rows_each;
    return slices;
}

void sbft_slices_sums(void* slices, int64_t first, int64_t last, const void* grad, const int32_t* place) {
    ((Slices*)slices)->sums(first, last, grad, place);
}

double sbft_slices_factors(void* slices) { return ((Slices*)slices)->factors(); }

void sbft_slices_squares(void* slices, int64_t first, int64_t last, const void* grad, const int32_t* place) {
    ((Slices*)slices)->squares(first, last, grad, place);
}

void sbft_slices_choose_step(void* slices) { ((Slices*)slices)->choose_step(); }

void sbft_slices_moves(void* slices, int64_t first, int64_t last, const void* grad, const int32_t* place) {
    ((Slices*)slices)->moves(first, last, grad, place);
}

// Frees it, and returns the sum of the squared new weights, negative if it was not taken.
double sbft_slices_end(void* slices) {
    const double total = ((Slices*)slices)->new_weight_sum();
    delete (Slices*)slices;
    return total;
}

double sbft_adafactor_full(Call* c) {
#define CALL(G)                                                                                                \
    return adafactor_full(WEIGHT(G), GRADIENT(G), c->stack, c->rows, c->columns, c->second, c->mass,       \
                          &c->weight_sum, settings(*c));
    FOR_DTYPES(CALL)
#undef CALL
}

double sbft_adamw(Call* c) {
#define CALL(G)                                                                                                  \
    return adamw(WEIGHT(G), GRADIENT(G), c->stack, c->rows, c->columns, c->first, c->second, c->mass,        \
                 c->second_mass, c->first_weight, settings(*c));
    FOR_DTYPES(CALL)
#undef CALL
}

double sbft_sgd(Call* c) {
#define CALL(G)    \
    return sgd(WEIGHT(G), GRADIENT(G), c->stack, c->rows, c->columns, c->first, c->mass, settings(*c));
    FOR_DTYPES(CALL)
#undef CALL
}

// For tests: the noise of `count` elements from `offset` on.
void sbft_noise(uint32_t first, uint32_t second, int64_t offset, int64_t count, int32_t* out) {
    for (int64_t i = 0; i < count; i++) {
        const uint64_t index = (uint64_t)(offset + i);
        const U16 hash = hashes((index >> 5) * 16, {first, second, true});
        out[i] = (hash[index & 15] >> (index & 16)) & 0xFFFF;
    }
}
}
