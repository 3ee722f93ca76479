// SPDX-License-Identifier: MIT
#include "live_migration/vm.hpp"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include <cerrno>
#include <exception>
#include <string_view>

#include "common/program.hpp"
#include "live_migration/migration.hpp"

namespace live {
namespace {

using namespace multifd;
using namespace multifd::migrate;

constexpr std::string_view block_name = "pc.ram";
constexpr std::string_view device_name = "vcpu0";

/// Calls a function of the guest's, which throws, for the library, which does not. The text goes into the Error's subject.
template <class Call>
Result<void> in_guest(const char* op, const Call& call) {
  try {
    call();
    return {};
  } catch (const std::exception& error) {
    auto failed = fail_errno(Stage::none, op, EIO);
    failed.error().subject = std::string_view(error.what());
    return failed;
  }
}

}  // namespace

std::string text_of(const MigrationProgress& progress, bool source) {
  if (progress.lost.paused) return "paused: no connection is left";
  switch (progress.step) {
    case MigrationStep::none: break;
    case MigrationStep::pages: return "the guest stands still, and the rest of its pages goes";
    case MigrationStep::device_state: return source ? "saving the guest's devices" : "loading the guest's devices";
    case MigrationStep::verify: return source ? "reading all memory for the pages' digests" : "comparing all pages";
    case MigrationStep::load: return "waiting for the destination to load the guest";
    case MigrationStep::hand_over:
      return source ? "waiting for the destination to run the guest" : "waiting for the source to hand over";
    case MigrationStep::farewell: return source ? "waiting for the destination's verdict" : "the guest runs";
  }
  if (progress.status >= MigrationStatus::postcopy_active)
    return fmt::format("{}, {} pages {}", to_string(progress.status), progress.missing_pages,
                       source ? "were missing" : "are missing");
  if (progress.status != MigrationStatus::active || !source) return to_string(progress.status);
  return fmt::format("{}, round {}{}", to_string(progress.status), progress.round,
                     progress.lost.away > 0 ? fmt::format(", {} channels lost", progress.lost.away) : "");
}

SourceVm::SourceVm(Guest& guest) : guest_(guest) {
  static_cast<void>(program::need(ram_.add(block_name, guest.memory())));
  dirty_.emplace(program::need(DirtyFromHooks::create(
      ram_, {.start = [&guest] { return in_guest("start the dirty log", [&] { guest.start_dirty_log(); }); },
             .fetch =
                 [&guest](BlockId, std::span<std::uint64_t> bitmap) {
                   return in_guest("fetch the dirty log", [&] { guest.fetch_dirty(bitmap); });
                 },
             .stop = [&guest] { return in_guest("stop the dirty log", [&] { guest.stop_dirty_log(); }); }})));
}

Result<void> SourceVm::pause() {
  return in_guest("stop the guest", [&] { guest_.stop(); });
}

Result<void> SourceVm::resume() {
  return in_guest("run the guest", [&] { guest_.run(); });
}

Result<void> SourceVm::save(StateWriter& to) {
  std::vector<std::byte> state;
  MULTIFD_TRY(in_guest("save the vCPU", [&] { state = guest_.save_state(); }));
  return to.device({.idstr = device_name}, state);
}

std::string Machine::text() const {
  return nlohmann::json{{"backend", backend == Backend::kvm ? "kvm" : "thread"}, {"run_after", run_after_s}}.dump();
}

Result<Machine> Machine::parse(std::span<const std::byte> text) {
  const std::string_view said(reinterpret_cast<const char*>(text.data()), text.size());
  const auto object = nlohmann::json::parse(said, nullptr, false);
  const auto refuse = [&] {
    return fail(Errc::setting_mismatch, Stage::hello, "the source is no live_migration, or another version of it");
  };
  if (!object.is_object() || !object.contains("backend") || !object["backend"].is_string() ||
      !object.contains("run_after") || !object["run_after"].is_number())
    return refuse();
  const auto backend = parse_backend(object["backend"].get<std::string>());
  if (!backend) return refuse();
  return Machine{.backend = *backend, .run_after_s = std::clamp(object["run_after"].get<double>(), 0.0, 60.0)};
}

Result<RamMap> DestinationVm::prepare(const Announcement& announced) {
  MULTIFD_TRY_ASSIGN(machine_, Machine::parse(announced.user));
  if (backend_ != Backend::automatic && backend_ != machine_.backend)
    return fail(Errc::setting_mismatch, Stage::hello, "the source's guest runs on another backend (--backend)");
  const auto blocks = announced.blocks;
  if (blocks.size() != 1 || blocks[0].idstr != block_name)
    return fail(Errc::block_list_mismatch, Stage::hello, "live_migration's guest has one RAM block, pc.ram");
  if (blocks[0].used_length > most_memory_)
    return fail(Errc::stream_limit_exceeded, Stage::hello, "guest memory (--memory)", blocks[0].used_length,
                most_memory_);
  RamMap ram(guest_page_size);
  // Only the size is needed: working set and seed come with the memory itself.
  MULTIFD_TRY(in_guest("make the guest", [&] {
    guest_ =
        make_guest(machine_.backend, {.memory_bytes = blocks[0].used_length, .working_set_bytes = guest_page_size});
  }));
  MULTIFD_TRY(ram.add(block_name, guest_->memory()));
  return ram;
}

Result<void> DestinationVm::load(StateReader& from) {
  for (;;) {
    MULTIFD_TRY_ASSIGN(const auto section, from.next());
    if (!section) return {};
    if (section->device.idstr != device_name)
      return fail(Errc::unknown_section, Stage::parse, "device that this VMM does not have", 0, 0,
                  section->device.idstr);
    MULTIFD_TRY(in_guest("load the vCPU", [&] { guest_->load_state(section->state); }));
  }
}

Result<void> DestinationVm::resume() {
  return in_guest("run the guest", [&] { guest_->run(); });
}

}  // namespace live
