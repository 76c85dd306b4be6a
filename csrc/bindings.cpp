// The only file that knows of Python: checks what comes in, releases the GIL, calls the core, owns no algorithm.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <thread>

#include "checksum.hpp"
#include "clusters.hpp"
#include "common_id.hpp"
#include "hamming_join.hpp"
#include "literal_filter.hpp"
#include "mapped_bytes.hpp"
#include "normalised_rows.hpp"
#include "parallel.hpp"
#include "simhash.hpp"

namespace py = pybind11;
using namespace slmfast;

namespace {

constexpr int kMaxThreads = 256;

template <class T>
using Dense = py::array_t<T, py::array::c_style>;  // no forcecast: a wrong dtype is an error, not a copy

unsigned thread_count(int threads) {
    if (threads < 0 || threads > kMaxThreads)
        throw py::value_error("threads must lie between 0 (all this process may use) and " +
                              std::to_string(kMaxThreads) + ", not " + std::to_string(threads));
    if (threads > 0) return static_cast<unsigned>(threads);
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0)
        return static_cast<unsigned>(std::clamp(CPU_COUNT(&allowed), 1, kMaxThreads));
#endif
    return std::clamp(std::thread::hardware_concurrency(), 1u, static_cast<unsigned>(kMaxThreads));
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512})
        if (isa_available(isa)) names.emplace_back(isa_name(isa));
    return names;
}

// The best instruction set of this CPU, or the one that SLMFAST_ISA asks for.
Isa active_isa() {
    const char* asked = std::getenv("SLMFAST_ISA");
    if (asked == nullptr || *asked == '\0') return best_isa();
    for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512})
        if (std::string(asked) == isa_name(isa) && isa_available(isa)) return isa;
    std::string known;
    for (const std::string& name : available_isas()) known += (known.empty() ? "" : ", ") + name;
    throw py::value_error("SLMFAST_ISA=" + std::string(asked) + " is not available here: unset it or use one of " +
                          known);
}

int checked_ngram(int ngram) {
    if (ngram < 1 || ngram > kMaxNgram)
        throw py::value_error("ngram must lie between 1 and " + std::to_string(kMaxNgram) + ", not " +
                              std::to_string(ngram));
    return ngram;
}

int checked_k(int k) {
    if (k < 0 || k > kMaxDistance)
        throw py::value_error("k must lie between 0 and " + std::to_string(kMaxDistance) + ", not " +
                              std::to_string(k));
    return k;
}

void check_rows(std::int64_t n) {
    if (n >= std::numeric_limits<std::uint32_t>::max())
        throw py::value_error("more than 2^32 - 2 rows in one call: split them");
}

template <class T>
std::size_t checked_length(const Dense<T>& array, const char* name) {
    if (array.ndim() != 1) throw py::value_error(std::string(name) + " must have one dimension");
    return static_cast<std::size_t>(array.size());
}

// The memory of a contiguous buffer, held while this lives.
struct HeldBytes {
    explicit HeldBytes(const py::buffer& buffer) : info(buffer.request()) {
        const bool dense = info.ndim == 0 || (info.ndim == 1 && info.strides[0] == info.itemsize);
        if (!dense) throw py::value_error("a buffer must be contiguous");
    }
    const unsigned char* data() const { return static_cast<const unsigned char*>(info.ptr); }
    std::size_t size() const { return static_cast<std::size_t>(info.size * info.itemsize); }
    py::buffer_info info;
};

// A text column together with the Python buffers that it reads.
class Texts {
public:
    // Each chunk: (layout, length, offset, validity or None, offsets or views, [data buffers]).
    explicit Texts(const py::list& chunks) {
        for (const py::handle& item : chunks) {
            const auto fields = py::cast<py::tuple>(item);
            if (fields.size() != 6) throw py::value_error("a chunk has six fields");
            TextChunk chunk;
            chunk.layout = layout(py::cast<std::string>(fields[0]));
            chunk.length = py::cast<std::int64_t>(fields[1]);
            chunk.offset = py::cast<std::int64_t>(fields[2]);
            chunk.validity = bytes(fields[3]);
            chunk.index = bytes(fields[4]);
            for (const py::handle& buffer : py::cast<py::list>(fields[5])) chunk.data.push_back(bytes(buffer));
            column_.append(std::move(chunk));
        }
        check_rows(column_.size());
    }

    const TextColumn& column() const { return column_; }

private:
    static Layout layout(const std::string& name) {
        if (name == "string") return Layout::offsets32;
        if (name == "large_string") return Layout::offsets64;
        if (name == "string_view") return Layout::views;
        throw py::value_error("unknown layout " + name);
    }

    Bytes bytes(const py::handle& object) {
        if (object.is_none()) return {};
        const HeldBytes& held = held_.emplace_back(py::cast<py::buffer>(object));
        return {reinterpret_cast<const char*>(held.data()), static_cast<std::int64_t>(held.size())};
    }

    TextColumn column_;
    std::vector<HeldBytes> held_;  // keeps the memory in place
};

py::tuple bind_fingerprints(const Texts& texts, bool normalised, int ngram, int threads) {
    const auto n = texts.column().size();
    Dense<std::uint64_t> out(n);
    Dense<std::uint8_t> states(n);
    const unsigned used = thread_count(threads);
    const Isa isa = active_isa();
    checked_ngram(ngram);
    auto* to = out.mutable_data();
    auto* state = reinterpret_cast<RowState*>(states.mutable_data());
    {
        const py::gil_scoped_release release;
        fingerprints(texts.column(), normalised, ngram, used, isa, to, state);
    }
    return py::make_tuple(out, states);
}

py::tuple bind_near_pairs(const Dense<std::uint64_t>& fingerprints, int k, int threads) {
    const std::size_t n = checked_length(fingerprints, "fingerprints");
    check_rows(static_cast<std::int64_t>(n));
    checked_k(k);
    const unsigned used = thread_count(threads);
    const Isa isa = active_isa();
    const std::uint64_t* from = fingerprints.data();
    const Pairs found = [&] {
        const py::gil_scoped_release release;
        return near_pairs(from, n, k, used, isa);
    }();
    const std::uint64_t* pairs = found.data.get();
    const auto m = static_cast<py::ssize_t>(found.size);
    Dense<std::int64_t> i(m);
    Dense<std::int64_t> j(m);
    Dense<std::uint8_t> distance(m);
    auto* to_i = i.mutable_data();
    auto* to_j = j.mutable_data();
    auto* to_distance = distance.mutable_data();
    {
        const py::gil_scoped_release release;
        // Each distance waits for two fingerprints from anywhere, so threads and asking early pay even here.
        constexpr std::size_t kAhead = 24;
        parallel_for(found.size, used, std::size_t{1} << 14, [&](std::size_t begin, std::size_t end, unsigned) {
            for (std::size_t pair = begin; pair < end; ++pair) {
                const std::uint64_t coming = pairs[std::min(pair + kAhead, found.size - 1)];
                __builtin_prefetch(from + (coming >> 32));
                __builtin_prefetch(from + (coming & 0xFFFFFFFFu));
                to_i[pair] = static_cast<std::int64_t>(pairs[pair] >> 32);
                to_j[pair] = static_cast<std::int64_t>(pairs[pair] & 0xFFFFFFFFu);
                const std::uint64_t difference = from[to_i[pair]] ^ from[to_j[pair]];
                to_distance[pair] = static_cast<std::uint8_t>(__builtin_popcountll(difference));
            }
        });
    }
    return py::make_tuple(i, j, distance);
}

py::tuple bind_join_plan(std::size_t n, int k) {
    const JoinPlan plan = join_plan(n, checked_k(k), active_isa());
    return py::make_tuple(plan.blocks, plan.required, plan.core_seconds);
}

// A column whose foreign rows were normalised elsewhere.
struct ReplacedTexts {
    ReplacedTexts(const Texts& texts, const Texts& replaced, const Dense<std::int64_t>& row_array) {
        checked_length(row_array, "rows");
        rows.assign(row_array.data(), row_array.data() + row_array.size());
        const bool ordered = std::adjacent_find(rows.begin(), rows.end(), std::greater_equal<>()) == rows.end();
        const bool inside = rows.empty() || (rows.front() >= 0 && rows.back() < texts.column().size());
        if (!ordered || !inside || replaced.column().size() != static_cast<std::int64_t>(rows.size()))
            throw py::value_error("the replaced rows must ascend, lie inside the column and have one text each");
        view = {&texts.column(), &replaced.column(), &rows};
    }
    ReplacedTexts(const ReplacedTexts&) = delete;  // the view looks into this very object
    std::vector<std::int64_t> rows;
    NormalisedTexts view;
};

const RowState* checked_states(const Dense<std::uint8_t>& states) {
    const bool known = std::all_of(states.data(), states.data() + states.size(), [](std::uint8_t state) {
        return state < static_cast<std::uint8_t>(RowState::foreign);
    });
    if (!known) throw py::value_error("every row needs a state, and none may be left to normalise");
    return reinterpret_cast<const RowState*>(states.data());
}

// Each span: (fingerprints, states, Texts of normalised texts). What they lie in must outlive the call.
std::vector<StoredSpan> stored_spans(const py::list& list, std::vector<py::object>& held) {
    std::vector<StoredSpan> spans;
    for (const py::handle& item : list) {
        const auto fields = py::cast<py::tuple>(item);
        if (fields.size() != 3) throw py::value_error("a span has three fields");
        const auto fingerprints = py::cast<Dense<std::uint64_t>>(fields[0]);
        const auto states = py::cast<Dense<std::uint8_t>>(fields[1]);
        const auto& texts = py::cast<const Texts&>(fields[2]);
        StoredSpan span;
        span.size = checked_length(fingerprints, "a span's fingerprints");
        if (checked_length(states, "a span's states") != span.size ||
            texts.column().size() != static_cast<std::int64_t>(span.size))
            throw py::value_error("a span needs one fingerprint, one state and one text a row");
        span.fingerprints = fingerprints.data();
        span.states = reinterpret_cast<const RowState*>(states.data());
        span.texts.raw = &texts.column();
        spans.push_back(span);
        held.insert(held.end(), {fingerprints, states, py::reinterpret_borrow<py::object>(fields[2])});
    }
    return spans;
}

py::tuple clustered(const Texts& texts, const Texts& replaced, const Dense<std::int64_t>& rows,
                    const Dense<std::uint64_t>& fingerprints, const Dense<std::uint8_t>& states,
                    const std::vector<StoredSpan>& spans, std::optional<double> verify, ClusterOptions options) {
    const std::int64_t n = texts.column().size();
    if (static_cast<std::int64_t>(checked_length(fingerprints, "fingerprints")) != n ||
        static_cast<std::int64_t>(checked_length(states, "states")) != n)
        throw py::value_error("fingerprints and states must have one value a row");
    const ReplacedTexts normalised(texts, replaced, rows);
    const auto* state = checked_states(states);
    if (verify && !(*verify >= 0.0 && *verify <= 1.0))
        throw py::value_error("verify must be None or lie between 0 and 1");
    options.verified = verify.has_value();
    options.verify = verify.value_or(0.0);
    options.isa = active_isa();
    Dense<std::int64_t> duplicate_of(n);
    Dense<std::uint8_t> distance(n);
    const auto* from = fingerprints.data();
    auto* to = duplicate_of.mutable_data();
    auto* to_distance = distance.mutable_data();
    {
        const py::gil_scoped_release release;
        cluster(normalised.view, from, state, n, spans, options, to, to_distance);
    }
    return py::make_tuple(duplicate_of, distance);
}

py::tuple bind_cluster(const Texts& texts, const Texts& replaced, const Dense<std::int64_t>& rows,
                       const Dense<std::uint64_t>& fingerprints, const Dense<std::uint8_t>& states, int k,
                       bool components, std::optional<double> verify, int ngram, int threads, std::size_t pair_budget) {
    ClusterOptions options;
    options.k = checked_k(k);
    options.components = components;
    options.ngram = checked_ngram(ngram);
    options.threads = thread_count(threads);
    options.pair_budget = pair_budget;
    return clustered(texts, replaced, rows, fingerprints, states, {}, verify, options);
}

py::tuple bind_cluster_against(const py::list& spans, const Texts& texts, const Texts& replaced,
                               const Dense<std::int64_t>& rows, const Dense<std::uint64_t>& fingerprints,
                               const Dense<std::uint8_t>& states, int k, std::optional<double> verify, int ngram,
                               int threads) {
    ClusterOptions options;
    options.k = checked_k(k);
    options.ngram = checked_ngram(ngram);
    options.threads = thread_count(threads);
    std::vector<py::object> held;
    const std::vector<StoredSpan> stored = stored_spans(spans, held);
    return clustered(texts, replaced, rows, fingerprints, states, stored, verify, options);
}

py::tuple bind_normalised(const Texts& texts, const Texts& replaced, const Dense<std::int64_t>& replaced_rows,
                          const Dense<std::int64_t>& rows, int threads) {
    const ReplacedTexts normalised(texts, replaced, replaced_rows);
    const std::size_t n = checked_length(rows, "rows");
    const std::int64_t* from = rows.data();
    const bool inside =
        std::all_of(from, from + n, [&](std::int64_t row) { return row >= 0 && row < texts.column().size(); });
    if (!inside) throw py::value_error("the rows must lie inside the column");
    const unsigned used = thread_count(threads);
    Dense<std::int64_t> offsets(static_cast<py::ssize_t>(n) + 1);
    auto* to_offsets = offsets.mutable_data();
    std::vector<std::string> pieces;
    {
        const py::gil_scoped_release release;
        pieces = normalised_rows(normalised.view, from, n, used, to_offsets);
    }
    Dense<std::uint8_t> bytes(to_offsets[n]);
    auto* to = bytes.mutable_data();
    {
        const py::gil_scoped_release release;
        for (const std::string& piece : pieces) to = std::copy(piece.begin(), piece.end(), to);
    }
    return py::make_tuple(offsets, bytes);
}

std::unique_ptr<MappedBytes> bind_mapped(int file, std::int64_t begin, std::int64_t end) {
    try {
        return std::make_unique<MappedBytes>(file, begin, end);
    } catch (const std::system_error& error) {
        errno = error.code().value();
        PyErr_SetFromErrno(PyExc_OSError);
        throw py::error_already_set();
    }
}

std::uint64_t bind_checksum(const py::buffer& buffer, int threads) {
    const HeldBytes bytes(buffer);
    const unsigned used = thread_count(threads);
    const auto* data = bytes.data();
    const std::size_t size = bytes.size();
    const py::gil_scoped_release release;
    return checksum(data, size, used);
}

std::int64_t bind_common_id(const Dense<std::int64_t>& few, const Dense<std::int64_t>& many, int threads) {
    const std::size_t n_few = checked_length(few, "few");
    const std::size_t n_many = checked_length(many, "many");
    const unsigned used = thread_count(threads);
    const auto* from = few.data();
    const auto* among = many.data();
    const py::gil_scoped_release release;
    return common_id(from, n_few, among, n_many, used);
}

// The rules that may match each text: those of row i are numbers[offsets[i]:offsets[i + 1]].
py::tuple bind_candidates(const LiteralFilter& filter, const Texts& texts) {
    const std::int64_t n = texts.column().size();
    Dense<std::int64_t> offsets(n + 1);
    auto* end = offsets.mutable_data();
    std::vector<std::uint32_t> found;
    {
        const py::gil_scoped_release release;
        LiteralFilter::Scratch scratch(filter);
        *end++ = 0;
        texts.column().for_each(0, n, [&](std::int64_t, bool, std::string_view text) {
            filter.candidates(text, scratch, found);
            *end++ = static_cast<std::int64_t>(found.size());
        });
    }
    return py::make_tuple(offsets, Dense<std::uint32_t>(static_cast<py::ssize_t>(found.size()), found.data()));
}

// A field of the wrong type is Python's TypeError, as a wrong argument is; pybind11 would say RuntimeError.
void translate_cast_error(std::exception_ptr raised) {
    try {
        if (raised) std::rethrow_exception(raised);
    } catch (const py::cast_error&) {
        py::set_error(PyExc_TypeError, "a field of the argument has the wrong type");
    }
}

// The normal form of a text, or None where Python's unicodedata has to give it.
std::optional<std::u32string> bind_normalise(const py::bytes& utf8) {
    CodePoints out;
    const Decoded decoded = normalise(std::string_view(utf8), out);
    if (decoded == Decoded::invalid) throw py::value_error("not valid UTF-8");
    if (decoded == Decoded::foreign) return std::nullopt;
    return std::u32string(out.begin(), out.end());
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    py::register_local_exception_translator(&translate_cast_error);
    module.doc() = "Near-duplicate search. Use slmfast.near_duplicates, which prepares what these functions take.";
    module.attr("FORMAT_VERSION") = kFormatVersion;
    module.attr("FEW") = static_cast<int>(RowState::few);
    module.attr("FOREIGN") = static_cast<int>(RowState::foreign);
    module.def("available_isas", &available_isas, "Instruction sets that this CPU has, slowest first.");
    module.def("active_isa", [] { return std::string(isa_name(active_isa())); },
               "The instruction set in use: the best there is, or the one named by SLMFAST_ISA.");
    py::class_<Texts>(module, "Texts", "A column of texts over Arrow buffers, read in place.")
        .def(py::init<const py::list&>(), py::arg("chunks"))
        .def("__len__", [](const Texts& texts) { return texts.column().size(); });
    py::class_<MappedBytes>(module, "MappedBytes", py::buffer_protocol(), "The bytes [begin, end) of an open file.")
        .def(py::init(&bind_mapped), py::arg("file"), py::arg("begin"), py::arg("end"))
        .def_buffer([](const MappedBytes& bytes) {
            return py::buffer_info(bytes.data(), static_cast<py::ssize_t>(bytes.size()));
        });
    py::class_<LiteralFilter>(module, "LiteralFilter", "Which rules may match a text, by literals they can't do without.")
        .def(py::init<const std::vector<LiteralRule>&>(), py::arg("rules"),
             "Each rule: alternatives, one of which must hold: clauses, all of which must hold: byte strings, one of "
             "which must occur.")
        .def("candidates", &bind_candidates, py::arg("texts"),
             "(offsets int64[n + 1], rule numbers uint32[m]), ascending for each text; no other rule can match it");
    module.def("fingerprints", &bind_fingerprints, py::arg("texts"), py::arg("normalised"), py::arg("ngram"),
               py::arg("threads"), "(fingerprints uint64[n], states uint8[n])");
    module.def("near_pairs", &bind_near_pairs, py::arg("fingerprints").noconvert(), py::arg("k"), py::arg("threads"),
               "(i int64[m], j int64[m], distance uint8[m]), i < j, sorted");
    module.def("join_plan", &bind_join_plan, py::arg("n"), py::arg("k"),
               "(blocks, blocks held equal, core-seconds expected) of near_pairs on n uniform fingerprints; no blocks "
               "where brute force is cheaper");
    module.def("cluster", &bind_cluster, py::arg("texts"), py::arg("replaced"),
               py::arg("rows").noconvert(),
               py::arg("fingerprints").noconvert(), py::arg("states").noconvert(), py::arg("k"), py::arg("components"),
               py::arg("verify"), py::arg("ngram"), py::arg("threads"), py::arg("pair_budget") = 0,
               "(duplicate_of int64[n], distance uint8[n])");
    module.def("cluster_against", &bind_cluster_against, py::arg("spans"), py::arg("texts"), py::arg("replaced"),
               py::arg("rows").noconvert(), py::arg("fingerprints").noconvert(), py::arg("states").noconvert(),
               py::arg("k"), py::arg("verify"), py::arg("ngram"), py::arg("threads"),
               "(duplicate_of int64[n], distance uint8[n]) where stored rows come first: -1 - p is their place p. "
               "Each span of them: (fingerprints uint64, states uint8, Texts of normalised texts)");
    module.def("normalised", &bind_normalised, py::arg("texts"), py::arg("replaced"),
               py::arg("replaced_rows").noconvert(), py::arg("rows").noconvert(), py::arg("threads"),
               "(offsets int64[m + 1], UTF-8 bytes uint8) of the normal forms of some rows, none of them null");
    module.def("checksum", &bind_checksum, py::arg("buffer"), py::arg("threads"),
               "64 bits that tell any damage of the bytes; frozen in the index file's version");
    module.def("common_id", &bind_common_id, py::arg("few").noconvert(), py::arg("many").noconvert(),
               py::arg("threads"), "The position in few (int64, ascending) of the first that is in many, or -1");
    module.def("normalise", &bind_normalise, py::arg("utf8"),
               "The normal form of a text, or None where the native module leaves it to Python.");
}
