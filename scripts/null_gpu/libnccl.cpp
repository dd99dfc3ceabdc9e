// In the place of libnccl: ranks of this machine exchange what they say through files in memory.
//
// Up to 64 MiB a call are really exchanged and reduced, above that ranks only wait for each other, unless what kernels
// should compute is computed. A collective or a
// receive holds the host until its peers are there; on a card it would hold a stream. Who does not come within ten
// minutes makes it fail. ORTHANT_NULL_GPU_EXCHANGE names the folder where the ranks of one run meet. Reductions of fp16
// and FP8 give the first rank's values.

#include "null_gpu.h"

#include <fcntl.h>
#include <nccl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

namespace {

const size_t kMoved = 64 << 20;
const int kPatience = 600, kTriesPerSecond = 5000;

// What the header calls ncclComm. `said`, `sent` and `got` count, so that the n-th call meets the peers' n-th.
struct Comm {
    int rank, size;
    std::string name;
    long said = 0, splits = 0;
    std::map<int, long> sent, got;
};

using Bytes = std::vector<char>;

struct Receive {
    Comm* comm;
    void* to;
    size_t bytes;
    int peer;
};

thread_local int depth = 0;
thread_local std::vector<Receive> waiting;  // of the group that is open: all is sent before anything is received

std::string folder(const Comm* comm) {
    const char* told = getenv("ORTHANT_NULL_GPU_EXCHANGE");
    return std::string(told ? told : "/dev/shm") + "/" + comm->name;
}

size_t width(ncclDataType_t type) {
    switch (type) {
        case ncclInt8: case ncclUint8: case ncclFloat8e4m3: case ncclFloat8e5m2: return 1;
        case ncclFloat16: case ncclBfloat16: return 2;
        case ncclInt32: case ncclUint32: case ncclFloat32: return 4;
        default: return 8;
    }
}

size_t moved(size_t bytes) { return bytes <= kMoved || null_gpu_computes() ? bytes : 0; }

// Files appear whole, by their last name.
ncclResult_t put(const std::string& name, const void* data, size_t bytes) {
    std::string part = name + ".part";
    FILE* file = fopen(part.c_str(), "w");
    bool whole = file && fwrite(data, 1, bytes, file) == bytes;
    if (file && fclose(file)) whole = false;
    if (whole && !rename(part.c_str(), name.c_str())) return ncclSuccess;
    null_gpu_complain("cannot write %s", name.c_str());
    return ncclSystemError;
}

ncclResult_t get(const std::string& name, void* data, size_t bytes) {
    for (long tries = 0; tries < long{kPatience} * kTriesPerSecond; tries++) {
        if (FILE* file = fopen(name.c_str(), "r")) {
            size_t read = fread(data, 1, bytes, file);
            bool over = fgetc(file) == EOF;
            fclose(file);
            if (read == bytes && over) return ncclSuccess;
            null_gpu_complain("a peer sent another size than %zu bytes: %s", bytes, name.c_str());
            return ncclInvalidArgument;
        }
        usleep(1000000 / kTriesPerSecond);
    }
    null_gpu_complain("no peer came within %d s: %s", kPatience, name.c_str());
    return ncclSystemError;
}

// What every rank said in this call, in the order of ranks. A rank that says something has read what was said in the
// call before, so what lies two calls back nobody reads any more.
ncclResult_t exchange(Comm* comm, const void* data, size_t bytes, std::vector<Bytes>* all) {
    all->assign(comm->size, Bytes(bytes));
    if (comm->size == 1) {
        memcpy((*all)[0].data(), data, bytes);
        return ncclSuccess;
    }
    long call = comm->said++;
    auto file = [&](long number, int rank) {
        return folder(comm) + "/" + std::to_string(number) + "." + std::to_string(rank);
    };
    ncclResult_t failed = put(file(call, comm->rank), data, bytes);
    for (int rank = 0; rank < comm->size && !failed; rank++) failed = get(file(call, rank), (*all)[rank].data(), bytes);
    if (call >= 2) unlink(file(call - 2, comm->rank).c_str());
    return failed;
}

struct Bfloat16 {
    uint16_t bits;
    Bfloat16(double value) {
        float single = static_cast<float>(value);
        uint32_t all;
        memcpy(&all, &single, sizeof all);
        bits = static_cast<uint16_t>((all + 0x7fff + (all >> 16 & 1)) >> 16);  // to the nearest, ties to even
    }
    operator double() const {
        uint32_t all = static_cast<uint32_t>(bits) << 16;
        float single;
        memcpy(&single, &all, sizeof single);
        return single;
    }
};

template <class Number>
void fold(const std::vector<Bytes>& all, size_t first, size_t count, ncclRedOp_t how, void* out) {
    using Wide = std::conditional_t<std::is_integral_v<Number>, long long, double>;
    for (size_t place = 0; place < count; place++) {
        auto said = [&](size_t rank) {
            return static_cast<Wide>(reinterpret_cast<const Number*>(all[rank].data())[first + place]);
        };
        Wide folded = said(0);
        for (size_t rank = 1; rank < all.size(); rank++) {
            Wide value = said(rank);
            if (how == ncclProd) folded *= value;
            else if (how == ncclMax) folded = value > folded ? value : folded;
            else if (how == ncclMin) folded = value < folded ? value : folded;
            else folded += value;
        }
        if (how == ncclAvg) folded /= static_cast<Wide>(all.size());
        static_cast<Number*>(out)[place] = static_cast<Number>(folded);
    }
}

void reduced(const std::vector<Bytes>& all, size_t first, size_t count, ncclDataType_t type, ncclRedOp_t how,
             void* out) {
    switch (type) {
        case ncclInt8: return fold<int8_t>(all, first, count, how, out);
        case ncclUint8: return fold<uint8_t>(all, first, count, how, out);
        case ncclInt32: return fold<int32_t>(all, first, count, how, out);
        case ncclUint32: return fold<uint32_t>(all, first, count, how, out);
        case ncclInt64: return fold<int64_t>(all, first, count, how, out);
        case ncclUint64: return fold<uint64_t>(all, first, count, how, out);
        case ncclFloat32: return fold<float>(all, first, count, how, out);
        case ncclFloat64: return fold<double>(all, first, count, how, out);
        case ncclBfloat16: return fold<Bfloat16>(all, first, count, how, out);
        default:
            if (null_gpu_hole("a reduction of fp16 or FP8")) abort();
            memcpy(out, all[0].data() + first * width(type), count * width(type));
    }
}

// A collective: noted, exchanged, and `made` of what all said where it was exchanged.
template <class Make>
ncclResult_t collective(const char* what, const void* data, size_t count, ncclDataType_t type, ncclComm_t opaque,
                        Make made) {
    null_gpu_note("collective %s %zu type %d", what, count, static_cast<int>(type));
    auto* comm = reinterpret_cast<Comm*>(opaque);
    size_t bytes = count * width(type);
    std::vector<Bytes> all;
    ncclResult_t failed = exchange(comm, data, moved(bytes), &all);
    if (!failed && moved(bytes) == bytes) made(comm, all);
    return failed;
}

ncclResult_t begin(ncclComm_t* out, int size, const std::string& name, int rank) {
    auto* comm = new Comm{rank, size, name};
    if (size > 1) mkdir(folder(comm).c_str(), 0700);
    *out = reinterpret_cast<ncclComm_t>(comm);
    return ncclSuccess;
}

std::string mail(const Comm* comm, int from, int to, long number) {
    return folder(comm) + "/" + std::to_string(from) + "-" + std::to_string(to) + "." + std::to_string(number);
}

ncclResult_t received(const Receive& wanted) {
    Comm* comm = wanted.comm;
    std::string name = mail(comm, wanted.peer, comm->rank, comm->got[wanted.peer]++);
    ncclResult_t failed = get(name, wanted.to, moved(wanted.bytes));
    unlink(name.c_str());
    return failed;
}

}  // namespace

extern "C" {

ncclResult_t ncclGetVersion(int* version) {
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    std::random_device draw;
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "%08x%08x%08x", draw(), draw(), draw());
    return ncclSuccess;
}

const char* ncclGetErrorString(ncclResult_t result) { return result ? "an error: see stderr" : "no error"; }
const char* ncclGetLastError(ncclComm_t) { return ""; }

ncclResult_t ncclCommInitRank(ncclComm_t* out, int size, ncclUniqueId id, int rank) {
    return begin(out, size, id.internal, rank);
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* out, int size, ncclUniqueId id, int rank, ncclConfig_t*) {
    return begin(out, size, id.internal, rank);
}

ncclResult_t ncclCommInitRankScalable(ncclComm_t* out, int size, int rank, int, ncclUniqueId* id, ncclConfig_t*) {
    return begin(out, size, id->internal, rank);
}

ncclResult_t ncclCommCount(ncclComm_t comm, int* size) {
    *size = reinterpret_cast<Comm*>(comm)->size;
    return ncclSuccess;
}

ncclResult_t ncclCommUserRank(ncclComm_t comm, int* rank) {
    *rank = reinterpret_cast<Comm*>(comm)->rank;
    return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* error) {
    *error = ncclSuccess;
    return ncclSuccess;
}

ncclResult_t ncclCommSplit(ncclComm_t opaque, int color, int key, ncclComm_t* out, ncclConfig_t*) {
    struct Wish {
        int color, key, rank;
    };
    auto* parent = reinterpret_cast<Comm*>(opaque);
    Wish mine{color, key, parent->rank};
    std::vector<Bytes> all;
    ncclResult_t failed = exchange(parent, &mine, sizeof mine, &all);
    if (failed) return failed;
    long split = parent->splits++;
    *out = nullptr;
    if (color < 0) return ncclSuccess;
    int rank = 0, size = 0;
    for (const Bytes& said : all) {
        Wish other;
        memcpy(&other, said.data(), sizeof other);
        if (other.color != color) continue;
        size++;
        rank += other.key < key || (other.key == key && other.rank < mine.rank);
    }
    return begin(out, size, parent->name + "-" + std::to_string(split) + "-" + std::to_string(color), rank);
}

ncclResult_t ncclAllReduce(const void* data, void* out, size_t count, ncclDataType_t type, ncclRedOp_t how,
                           ncclComm_t comm, cudaStream_t) {
    return collective("all_reduce", data, count, type, comm,
                      [&](Comm*, const auto& all) { reduced(all, 0, count, type, how, out); });
}

ncclResult_t ncclReduce(const void* data, void* out, size_t count, ncclDataType_t type, ncclRedOp_t how, int root,
                        ncclComm_t comm, cudaStream_t) {
    return collective("reduce", data, count, type, comm, [&](Comm* here, const auto& all) {
        if (here->rank == root) reduced(all, 0, count, type, how, out);
    });
}

ncclResult_t ncclBroadcast(const void* data, void* out, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t) {
    const void* said = reinterpret_cast<Comm*>(comm)->rank == root ? data : out;  // others may give no data
    return collective("broadcast", said, count, type, comm,
                      [&](Comm*, const auto& all) { memcpy(out, all[root].data(), all[root].size()); });
}

ncclResult_t ncclBcast(void* data, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream) {
    return ncclBroadcast(data, data, count, type, root, comm, stream);
}

ncclResult_t ncclAllGather(const void* data, void* out, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t) {
    return collective("all_gather", data, count, type, comm, [&](Comm*, const auto& all) {
        auto* place = static_cast<char*>(out);
        for (const Bytes& said : all) place = static_cast<char*>(memcpy(place, said.data(), said.size())) + said.size();
    });
}

ncclResult_t ncclReduceScatter(const void* data, void* out, size_t count, ncclDataType_t type, ncclRedOp_t how,
                               ncclComm_t comm, cudaStream_t) {
    size_t whole = count * reinterpret_cast<Comm*>(comm)->size;
    return collective("reduce_scatter", data, whole, type, comm, [&](Comm* here, const auto& all) {
        reduced(all, here->rank * count, count, type, how, out);
    });
}

ncclResult_t ncclSend(const void* data, size_t count, ncclDataType_t type, int peer, ncclComm_t opaque, cudaStream_t) {
    null_gpu_note("collective send %zu type %d", count, static_cast<int>(type));
    auto* comm = reinterpret_cast<Comm*>(opaque);
    if (comm->size == 1) mkdir(folder(comm).c_str(), 0700);  // to itself
    return put(mail(comm, comm->rank, peer, comm->sent[peer]++), data, moved(count * width(type)));
}

ncclResult_t ncclRecv(void* out, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t) {
    null_gpu_note("collective recv %zu type %d", count, static_cast<int>(type));
    Receive wanted{reinterpret_cast<Comm*>(comm), out, count * width(type), peer};
    if (!depth) return received(wanted);
    waiting.push_back(wanted);
    return ncclSuccess;
}

ncclResult_t ncclGroupStart() {
    depth++;
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd() {
    if (--depth) return ncclSuccess;
    std::vector<Receive> all;
    all.swap(waiting);
    ncclResult_t failed = ncclSuccess;
    for (const Receive& wanted : all) {
        if (!failed) failed = received(wanted);
    }
    return failed;
}

}  // extern "C"
