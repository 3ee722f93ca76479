// SPDX-License-Identifier: MIT
//
// The Transport contract of transport/policy.hpp as a check that you can run on a transport of your own:
//   auto report = multifd::check_transport_contract<MyTransport>([] { return my_connected_pair(); });
// `make_pair` returns a fresh std::pair: the second reads the bytes that the first writes. Only this direction is
// checked, so one-way streams fit, too.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "multifd/buffers.hpp"
#include "multifd/result.hpp"
#include "multifd/testing/contract_report.hpp"
#include "multifd/testing/timed_call.hpp"
#include "multifd/transport/algorithms.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd {

/// What the reader sees when the writer has called shutdown().
enum class AfterShutdown {
  error,               ///< a broken stream, the best a transport can do: TCP, memory
  end,                 ///< an error or an end: UNIX sockets
  end_when_destroyed,  ///< the same, but only when the writing transport is destroyed: pipes
};

struct TransportContractOptions {
  /// What is asked of shutdown(). Default: that the reader sees an end of any kind.
  AfterShutdown after_shutdown = AfterShutdown::end;
  /// How long a call may go on that shutdown() must end. Only a transport that fails needs so long.
  std::chrono::milliseconds patience = std::chrono::seconds(5);
  /// More than the stream ever buffers, so that a writer without a reader blocks in the end.
  std::size_t overflow_bytes = std::size_t{64} << 20;
};

namespace testing::detail {

inline std::byte pattern_byte(std::size_t position) {
  return static_cast<std::byte>((position * 0x9e3779b97f4a7c15ULL) >> 56);
}

inline std::vector<std::byte> pattern(std::size_t size) {
  std::vector<std::byte> bytes(size);
  for (std::size_t i = 0; i < size; ++i) bytes[i] = pattern_byte(i);
  return bytes;
}

/// Cuts bytes into buffers of `piece` bytes with an empty one before every third and one at the end.
inline std::vector<iovec> split(std::vector<std::byte>& bytes, std::size_t piece) {
  std::vector<iovec> buffers;
  for (std::size_t at = 0; at < bytes.size(); at += piece) {
    if (buffers.size() % 3 == 0) buffers.push_back({nullptr, 0});
    buffers.push_back({bytes.data() + at, std::min(piece, bytes.size() - at)});
  }
  buffers.push_back({nullptr, 0});
  return buffers;
}

/// Both ends, shared with a thread that may never end.
template <class T>
struct Ends {
  explicit Ends(std::pair<T, T> pair)
      : writer(std::make_unique<T>(std::move(pair.first))), reader(std::move(pair.second)) {}
  std::unique_ptr<T> writer;
  T reader;
};

template <Transport T>
class TransportContract {
 public:
  TransportContract(std::function<std::pair<T, T>()> make_pair, TransportContractOptions options)
      : make_pair_(std::move(make_pair)), options_(options) {}

  ContractReport run() {
    for (const std::size_t bytes : {1UL, 2UL, 4095UL, 65536UL, 1000003UL}) {
      for (const std::size_t piece : {1UL, 7UL, 4096UL, 1000003UL}) {
        if (bytes / piece > 10000) continue;  // a million buffers of one byte find nothing new
        bytes_arrive(bytes, piece, 4096);
        if (report_.ok()) bytes_arrive(bytes, 4096, piece);
        if (!report_.ok()) return std::move(report_);  // nothing else can hold
      }
    }
    partial_read();
    moved_transport_works();
    finish_ends_after_all_data();
    destroyed_is_seen();
    shutdown_ends_reader();
    shutdown_ends_writer();
    shutdown_is_idempotent();
    return std::move(report_);
  }

 private:
  using EndsPtr = std::shared_ptr<Ends<T>>;
  EndsPtr make() { return std::make_shared<Ends<T>>(make_pair_()); }

  bool expect(bool held, const std::string& what) { return report_.expect(held, what); }

  static std::string text(const Error& error) { return " (" + describe(error) + ")"; }

  void bytes_arrive(std::size_t size, std::size_t write_piece, std::size_t read_piece) {
    const std::string name = std::to_string(size) + " bytes, written in pieces of " + std::to_string(write_piece) +
                             " and read in pieces of " + std::to_string(read_piece);
    EndsPtr ends = make();
    TimedCall<Result<void>> writing([ends, size, write_piece] {
      std::vector<std::byte> bytes = pattern(size);
      std::vector<iovec> buffers = split(bytes, write_piece);
      return write_all(*ends->writer, std::span(buffers));
    });
    using Received = std::pair<Result<void>, bool>;
    TimedCall<Received> reading([ends, size, read_piece]() -> Received {
      std::vector<std::byte> bytes(size);
      std::vector<iovec> buffers = split(bytes, read_piece);
      Result<void> result = read_exact(ends->reader, std::span(buffers));
      return {result, bytes == pattern(size)};
    });
    // Longer than for one call: up to a thousand of them, and where they are late nothing else is checked.
    const Result<void>* written = writing.wait(10 * options_.patience);
    const Received* received = written ? reading.wait(10 * options_.patience) : nullptr;
    if (!expect(written && received, name + ": did not come to an end")) return ends->writer->shutdown();
    expect(written->has_value(), name + ": write failed" + (*written ? "" : text(written->error())));
    const Result<void>& read = received->first;
    if (expect(read.has_value(), name + ": read failed" + (read ? "" : text(read.error())))) {
      expect(received->second, name + ": other bytes arrived than were written");
    }
  }

  void partial_read() {
    EndsPtr ends = make();
    std::vector<std::byte> sent = pattern(5);
    expect(write_all(*ends->writer, std::span<const std::byte>(sent)).has_value(), "writing 5 bytes failed");
    using Read = std::pair<Result<std::size_t>, std::vector<std::byte>>;
    TimedCall<Read> reading([ends]() -> Read {
      std::vector<std::byte> bytes(4096);
      const iovec buffers[] = {{nullptr, 0}, {bytes.data(), 2000}, {bytes.data() + 2000, 2096}};
      Result<std::size_t> count = ends->reader.read_some(buffers);
      return {count, bytes};
    });
    const Read* read = reading.wait(options_.patience);
    if (!expect(read, "read_some() waits for more bytes than have been sent")) return ends->reader.shutdown();
    if (!expect(read->first.has_value(), "read_some() with larger buffers than data failed")) return;
    const std::size_t count = *read->first;
    if (!expect(count >= 1 && count <= 5, "read_some() reports " + std::to_string(count) + " bytes of 5")) return;
    expect(std::equal(sent.begin(), sent.begin() + static_cast<std::ptrdiff_t>(count), read->second.begin()),
           "read_some() with larger buffers than data stored other bytes");
    expect(std::all_of(read->second.begin() + static_cast<std::ptrdiff_t>(count), read->second.end(),
                       [](std::byte b) { return b == std::byte{0}; }),
           "read_some() wrote behind the bytes that it reports");
  }

  void moved_transport_works() {
    std::pair<T, T> pair = make_pair_();
    std::pair<T, T> other = make_pair_();
    T writer(std::move(pair.first));
    other.second = std::move(pair.second);  // closes what it held before
    auto ends = std::make_shared<Ends<T>>(std::pair<T, T>(std::move(writer), std::move(other.second)));
    const std::vector<std::byte> sent = pattern(100);
    expect(write_all(*ends->writer, std::span<const std::byte>(sent)).has_value(), "a moved transport cannot write");
    TimedCall<bool> reading([ends, sent] {
      std::vector<std::byte> bytes(100);
      return read_exact(ends->reader, std::span<std::byte>(bytes)).has_value() && bytes == sent;
    });
    const bool* received = reading.wait(options_.patience);
    if (!received) ends->reader.shutdown();
    expect(received && *received, "a moved transport does not read what was written");
  }

  void finish_ends_after_all_data() {
    constexpr std::size_t size = 300000;
    for (const bool destroy : {false, true}) {
      const std::string name = destroy ? "finish() and destruction" : "finish()";
      EndsPtr ends = make();
      TimedCall<Result<void>> writing([ends, destroy]() -> Result<void> {
        const std::vector<std::byte> bytes = pattern(size);
        Result<void> result = write_all(*ends->writer, std::span<const std::byte>(bytes));
        if (result) result = ends->writer->finish();
        if (destroy) ends->writer.reset();
        return result;
      });
      using Received = std::pair<Result<std::size_t>, bool>;
      TimedCall<Received> reading([ends]() -> Received {
        std::vector<std::byte> bytes(size + 1);
        iovec buffer = mutable_buffer(bytes);
        Result<std::size_t> count = read_at_least(ends->reader, std::span(&buffer, 1), size + 1);
        std::byte more;
        const iovec last = mutable_buffer(std::span(&more, 1));
        const Result<std::size_t> again = ends->reader.read_some(std::span(&last, 1));
        return {count, again.has_value() && *again == 0};
      });
      const Result<void>* written = writing.wait(options_.patience);
      const Received* received = reading.wait(options_.patience);
      if (!expect(written && received, name + ": the reader does not see an end")) {
        if (written) ends->reader.shutdown();
        continue;
      }
      expect(written->has_value(), name + ": failed" + (*written ? "" : text(written->error())));
      const Result<std::size_t>& count = received->first;
      if (!expect(count.has_value(), name + ": reading failed" + (count ? "" : text(count.error())))) continue;
      expect(*count == size, name + ": " + std::to_string(*count) + " bytes arrived of " + std::to_string(size));
      expect(received->second, name + ": after the end, a read does not say 0 again");
    }
  }

  /// Reads to the end: true for an orderly one.
  TimedCall<bool> read_to_end(EndsPtr ends) {
    return TimedCall<bool>([ends] {
      std::vector<std::byte> bytes(65536);
      const iovec buffer = mutable_buffer(bytes);
      for (;;) {
        const Result<std::size_t> count = ends->reader.read_some(std::span(&buffer, 1));
        if (!count) return false;
        if (*count == 0) return true;
      }
    });
  }

  void destroyed_is_seen() {
    EndsPtr ends = make();
    ends->writer.reset();
    TimedCall<bool> reading = read_to_end(ends);
    const bool* orderly = reading.wait(options_.patience);
    if (!expect(orderly, "destruction without finish(): the reader does not see it")) return ends->reader.shutdown();
    if (options_.after_shutdown == AfterShutdown::error) {
      expect(!*orderly, "destruction without finish(): looks like an orderly end");
    }
  }

  void shutdown_ends_reader() {
    EndsPtr ends = make();
    TimedCall<bool> reading = read_to_end(ends);
    expect(!reading.wait(std::chrono::milliseconds(50)), "a read without data does not block");
    ends->reader.shutdown();
    expect(reading.wait(options_.patience), "shutdown() does not end a blocked read");
    TimedCall<bool> later = read_to_end(ends);
    expect(later.wait(options_.patience), "a read after shutdown() blocks");
  }

  void shutdown_ends_writer() {
    EndsPtr ends = make();
    const auto write_without_end = [ends, size = options_.overflow_bytes]() -> Result<void> {
      const std::vector<std::byte> bytes(1 << 16);
      for (std::size_t done = 0; done < size; done += bytes.size()) {
        Result<void> result = write_all(*ends->writer, std::span<const std::byte>(bytes));
        if (!result) return result;
      }
      return {};
    };
    TimedCall<Result<void>> writing(write_without_end);
    if (writing.wait(std::chrono::milliseconds(50))) {
      return report_.note("overflow_bytes went into the stream without a reader: blocked writes were not checked");
    }
    ends->writer->shutdown();
    const Result<void>* written = writing.wait(options_.patience);
    if (!expect(written, "shutdown() does not end a blocked write")) return;
    expect(!written->has_value(), "a write that shutdown() ended says that it succeeded");
    TimedCall<Result<void>> later(write_without_end);
    const Result<void>* refused = later.wait(options_.patience);
    if (expect(refused, "a write after shutdown() blocks")) {
      expect(!refused->has_value(), "a write after shutdown() says that it succeeded");
    }
    if (options_.after_shutdown == AfterShutdown::end_when_destroyed) ends->writer.reset();
    TimedCall<bool> reading = read_to_end(ends);
    const bool* orderly = reading.wait(options_.patience);
    if (!expect(orderly, "shutdown(): the other side does not see an end")) return ends->reader.shutdown();
    if (options_.after_shutdown == AfterShutdown::error) {
      expect(!*orderly, "shutdown(): the other side sees an orderly end instead of a broken stream");
    }
  }

  void shutdown_is_idempotent() {
    EndsPtr ends = make();
    TimedCall<bool> calls([ends] {
      for (int i = 0; i < 3; ++i) ends->writer->shutdown();
      std::thread beside([ends] { ends->writer->shutdown(); });
      ends->writer->shutdown();
      beside.join();
      T moved(std::move(*ends->writer));
      moved.shutdown();
      return true;
    });
    expect(calls.wait(options_.patience), "a second shutdown() does not return");
  }

  std::function<std::pair<T, T>()> make_pair_;
  TransportContractOptions options_;
  ContractReport report_;
};

}  // namespace testing::detail

/// Checks a transport against the contract of the Transport concept.
/// Params `make_pair`: returns a fresh connected `std::pair<T, T>`, first writes, second reads;
///   a copyable callable.
/// Returns the rules that were broken. When a call never returns, its thread and the transport below are left behind.
/// Cost: about a second, some threads.
template <Transport T, class MakePair>
[[nodiscard]] ContractReport check_transport_contract(MakePair make_pair, TransportContractOptions options = {}) {
  static_assert(std::is_same_v<decltype(make_pair()), std::pair<T, T>>);
  return testing::detail::TransportContract<T>(std::move(make_pair), options).run();
}

}  // namespace multifd
