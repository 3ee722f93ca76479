// SPDX-License-Identifier: MIT
#include "common/report.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include <nlohmann/json.hpp>

#include <cerrno>
#include <cstring>
#include <fstream>

#include "common/limits.hpp"
#include "common/program.hpp"
#include "common/tell.hpp"

namespace program {
namespace {

/// Whether a file looks like what a program has reported before.
bool holds_report(const std::string& path) {
  constexpr std::size_t longest = 16 << 20;
  std::ifstream file(path);
  std::string text(longest, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<std::size_t>(file.gcount()));
  const auto object = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  return object.is_object() && object.contains("ok");
}

}  // namespace

Spent Meter::whole_process() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
  };
  return {.began = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(),
          .user_seconds = seconds(usage.ru_utime),
          .system_seconds = seconds(usage.ru_stime),
          .minor_faults = static_cast<std::uint64_t>(usage.ru_minflt)};
}

Spent Meter::spent() const {
  const Spent now = whole_process();
  return {.began = start_.began,
          .seconds = now.began - start_.began,
          .user_seconds = now.user_seconds - start_.user_seconds,
          .system_seconds = now.system_seconds - start_.system_seconds,
          .minor_faults = now.minor_faults - start_.minor_faults};
}

double rate(double bytes, double seconds) { return seconds > 0 ? bytes / seconds / double(1 << 30) : 0; }

nlohmann::json report(double seconds, std::uint64_t ram_bytes, std::uint64_t main_zero_pages,
                      const std::vector<multifd::ChannelStats>& channels) {
  const multifd::ChannelStats sum = multifd::total(channels);
  nlohmann::json list = nlohmann::json::array();
  for (const multifd::ChannelStats& each : channels)
    list.push_back({{"id", each.id},
                    {"packets", each.packets},
                    {"normal_pages", each.normal_pages},
                    {"zero_pages", each.zero_pages},
                    {"wire_bytes", each.wire_bytes}});
  return {{"ok", true},
          {"error", nullptr},
          {"seconds", seconds},
          {"ram_bytes", ram_bytes},
          {"normal_pages", sum.normal_pages},
          {"zero_pages", sum.zero_pages + main_zero_pages},
          {"wire_bytes", sum.wire_bytes},
          {"gib_per_s", rate(static_cast<double>(ram_bytes), seconds)},
          {"channels", std::move(list)}};
}

void add_spent(nlohmann::json& object, const Spent& spent) {
  object["began"] = spent.began;
  object["cpu_seconds"] = spent.user_seconds + spent.system_seconds;
  object["user_seconds"] = spent.user_seconds;
  object["system_seconds"] = spent.system_seconds;
  object["minor_faults"] = spent.minor_faults;
}

nlohmann::json text_or_null(const std::string& text) { return text.empty() ? nlohmann::json() : nlohmann::json(text); }

nlohmann::json failure_report(const std::string& error, double seconds) {
  nlohmann::json object = report(seconds, 0, 0, {});
  object["ok"] = false;
  object["error"] = error;
  return object;
}

JsonFile::JsonFile(std::string path) : path_(std::move(path)) {
  if (path_.empty() || path_ == "-") return;
  const auto fail = [this](const std::string& why) { throw Failure(fmt::format("--json {}: {}", path_, why)); };
  // Not to wait for a reader of a FIFO.
  file_ = Descriptor(::open(path_.c_str(), O_WRONLY | O_CREAT | O_NONBLOCK | O_NOCTTY | O_CLOEXEC, 0666));
  struct stat status{};
  if (file_.get() < 0 && errno == ENXIO) fail("nobody reads from it");
  if (file_.get() < 0 || ::fstat(file_.get(), &status) != 0) fail(error_text(errno));
  if (S_ISCHR(status.st_mode) || S_ISFIFO(status.st_mode)) return;
  if (!S_ISREG(status.st_mode)) fail("not a file");
  if (::flock(file_.get(), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
    fail("another program writes its report there");
  if (status.st_size == 0) return;
  if (!holds_report(path_)) fail("holds something that is no report, and is not overwritten: choose another name");
  if (::ftruncate(file_.get(), 0) != 0) fail(error_text(errno));
}

void JsonFile::write(const nlohmann::json& object) noexcept {
  if (path_.empty()) return;
  const int fd = path_ == "-" ? STDOUT_FILENO : file_.get();
  // A file holds one report, the last; what is no file cannot be taken back.
  const auto clear = [&] {
    if (path_ != "-" && ::ftruncate(fd, 0) == 0) (void)::lseek(fd, 0, SEEK_SET);
  };
  clear();
  try {
    write_text(fd, json_text(object), "--json " + path_);
  } catch (const std::exception& error) {
    clear();
    tell("warning: the report is lost: {}\n", text_of(error));
  }
}

std::string json_text(const nlohmann::json& object) {
  return object.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

}  // namespace program
