// In the place of CUDA's runtime (libcudart), third part: kernels of Transformer Engine's user buffers, on the host.
//
// They are what ranks of a tensor-parallel group say to each other under matrix products, over memory that each has
// mapped of the others (cudaIpcOpenMemHandle). A rank tells another by a count in the other's memory, as on a card: so
// what is proved is where the library points to, how much it moves and that its ranks meet in one order.

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "engine/numbers.h"
#include "null_gpu.h"

namespace {

const size_t kLine = 16;         // bytes: the unit of their offsets and sizes
const int kBeforeFlags = 32;     // counts before a rank's flags; the first is of its meetings
const auto kPatience = std::chrono::minutes(4);

template <class Value>
Value argument(void** arguments, int place) {
    return *static_cast<Value*>(arguments[place]);
}

bool reached(const int* count, int wanted) {
    auto until = std::chrono::steady_clock::now() + kPatience;
    while (static_cast<int>(static_cast<unsigned>(__atomic_load_n(count, __ATOMIC_ACQUIRE)) -
                            static_cast<unsigned>(wanted)) < 0) {
        if (std::chrono::steady_clock::now() > until) {
            null_gpu_complain("a rank waited four minutes for another one's user buffer");
            return false;
        }
        std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    return true;
}

// The ranks that exchange a buffer, and where their flags and parts of it lie.
struct Ranks {
    int count, me, step, first, flags;
    char** memory;
    int buffer;

    Ranks(int count, void** arguments, int memory_at)
        : count(count), me(argument<int>(arguments, 3)), step(argument<int>(arguments, 4)),
          first(argument<int>(arguments, 2)), flags(argument<int>(arguments, 1)),
          memory(argument<char**>(arguments, memory_at)), buffer(argument<int>(arguments, memory_at + 1)) {}

    int place(int rank) const { return rank * step + first; }
    int* flags_of(int rank) const { return reinterpret_cast<int*>(memory[place(rank)]) + flags; }
    char* part_of(int rank) const { return memory[place(rank) + buffer]; }

    // All have come as far as this.
    bool meet() const {
        int* meetings = flags_of(me) - kBeforeFlags;
        int number = *meetings + 1;
        for (int rank = 0; rank < count; rank++) __atomic_store_n(flags_of(rank) + place(me), number, __ATOMIC_RELEASE);
        for (int rank = 0; rank < count; rank++)
            if (!reached(flags_of(me) + place(rank), number)) return false;
        *meetings = number;
        return true;
    }
};

void add_up(float* sums, const char* line, const engine::Fp8* fp8) {
    if (fp8) {
        for (size_t at = 0; at < kLine; at++) sums[at] += engine::from_fp8(static_cast<uint8_t>(line[at]), *fp8);
        return;
    }
    uint16_t values[kLine / 2];
    memcpy(values, line, kLine);
    for (size_t at = 0; at < kLine / 2; at++) sums[at] += engine::from_bfloat16(values[at]);
}

void put(const float* sums, float scale, char* line) {
    uint16_t values[kLine / 2];
    for (size_t at = 0; at < kLine / 2; at++) values[at] = engine::to_bfloat16(sums[at] * scale);
    memcpy(line, values, kLine);
}

// Where a line of a matrix lies whose rows have so many lines, one row `skip` lines behind the other.
size_t strided(size_t line, size_t row, size_t skip) { return line / row * skip + line % row; }

// The sum over ranks of this rank's share, in place.
bool reduce_scatter(int count, void** arguments) {
    Ranks ranks(count, arguments, 7);
    size_t offset = argument<int>(arguments, 5), lines = argument<int>(arguments, 6);
    if (!ranks.meet()) return false;
    for (size_t line = offset; line < offset + lines; line++) {
        float sums[kLine] = {};
        for (int rank = 0; rank < count; rank++) add_up(sums, ranks.part_of(rank) + line * kLine, nullptr);
        put(sums, 1, ranks.part_of(ranks.me) + line * kLine);
    }
    return true;
}

// The same into a matrix; `cut_rows` where the buffer's rows are strided too. FP8 becomes bf16, two lines of one.
bool reduce_scatter_into(int count, void** arguments, bool cut_rows, const engine::Fp8* fp8) {
    Ranks ranks(count, arguments, 9);
    size_t offset = argument<int>(arguments, 5), lines = argument<int>(arguments, 6);
    size_t row = argument<int>(arguments, 7), skip = argument<int>(arguments, 8);
    char* out = argument<char*>(arguments, 11);
    float scale = fp8 ? engine::from_bfloat16(engine::to_bfloat16(*argument<float*>(arguments, 12))) : 1;
    if (!ranks.meet()) return false;
    size_t mine = cut_rows ? ranks.me * (lines * skip / row) : 0;
    for (size_t line = 0; line < lines; line++) {
        size_t from = offset + mine + (cut_rows ? strided(line, row, skip) : line);
        float sums[kLine] = {};
        for (int rank = 0; rank < count; rank++) add_up(sums, ranks.part_of(rank) + from * kLine, fp8);
        size_t halves = fp8 ? 2 : 1;
        for (size_t half = 0; half < halves; half++) {
            size_t to = strided(halves * line + half, row, skip);
            put(sums + half * kLine / 2, scale, out + to * kLine);
        }
    }
    return true;
}

// This rank's share into every rank's buffer.
bool all_gather(int count, void** arguments) {
    Ranks ranks(count, arguments, 7);
    size_t offset = argument<int>(arguments, 5) * kLine, bytes = argument<int>(arguments, 6) * kLine;
    for (int rank = 0; rank < count; rank++)
        if (rank != ranks.me) memcpy(ranks.part_of(rank) + offset, ranks.part_of(ranks.me) + offset, bytes);
    return ranks.meet();
}

bool send(unsigned blocks, void** arguments) {
    memcpy(argument<char*>(arguments, 3), argument<char*>(arguments, 2), argument<int>(arguments, 4) * kLine);
    __atomic_fetch_add(argument<int*>(arguments, 1), static_cast<int>(blocks), __ATOMIC_RELEASE);
    return true;
}

bool receive(void** arguments) {
    int* received = argument<int*>(arguments, 4);
    *received += argument<int>(arguments, 6);
    return reached(argument<int*>(arguments, 5), *received);
}

// The sum of matrices that lie one behind the other.
bool reduce(void** arguments, const engine::Fp8* fp8) {
    auto* from = argument<char*>(arguments, 0);
    auto* out = argument<char*>(arguments, 1);
    float scale = fp8 ? *argument<float*>(arguments, 2) : 1;
    int count = argument<int>(arguments, fp8 ? 3 : 2), size = argument<int>(arguments, fp8 ? 4 : 3);
    size_t at_once = fp8 ? kLine : kLine / 2, lines = size / at_once;
    for (size_t line = 0; line < lines; line++) {
        float sums[kLine] = {};
        for (int one = 0; one < count; one++) add_up(sums, from + (one * lines + line) * kLine, fp8);
        for (size_t half = 0; half < at_once / (kLine / 2); half++)
            put(sums + half * kLine / 2, scale, out + (line * (at_once / (kLine / 2)) + half) * kLine);
    }
    return true;
}

// Behind a C++ name's identifier, which is written with its length before it; null where it is another name.
const char* behind(const char* name, const std::string& identifier) {
    std::string written = std::to_string(identifier.size()) + identifier;
    const char* found = strstr(name, written.c_str());
    return found ? found + written.size() : nullptr;
}

int ranks_of(const char* parameters) { return strncmp(parameters, "ILi", 3) ? 0 : atoi(parameters + 3); }

const engine::Fp8* fp8_of(const char* parameters) {
    return strstr(parameters, "e5m2") ? &engine::kE5M2 : &engine::kE4M3;
}

int answer(bool done) { return done ? 1 : -1; }

}  // namespace

int null_gpu_kernel(const char* name, unsigned blocks, void** arguments) {
    const std::string sum = "userbuffers_fp16_sum_inplace_gpu_";
    if (behind(name, "kuserbuffers_pushsend")) return answer(send(blocks, arguments));
    if (behind(name, "kuserbuffers_pushrecv")) return answer(receive(arguments));
    if (const char* told = behind(name, sum + "rw_ag")) return answer(all_gather(ranks_of(told), arguments));
    if (const char* told = behind(name, sum + "rr_rs")) return answer(reduce_scatter(ranks_of(told), arguments));
    if (const char* told = behind(name, sum + "rr_rs_oop"))
        return answer(reduce_scatter_into(ranks_of(told), arguments, false, nullptr));
    if (const char* told = behind(name, sum + "rr_rs_oop_stride"))
        return answer(reduce_scatter_into(ranks_of(told), arguments, true, nullptr));
    if (const char* told = behind(name, sum + "rr_rs_oop_fp8"))
        return answer(reduce_scatter_into(ranks_of(told), arguments, false, fp8_of(told)));
    if (behind(name, "reduce_bf16_cuda")) return answer(reduce(arguments, nullptr));
    if (const char* told = behind(name, "reduce_fp8_in_bf16_out_cuda")) return answer(reduce(arguments, fp8_of(told)));
    return 0;
}
