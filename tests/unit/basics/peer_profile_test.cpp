// SPDX-License-Identifier: MIT
#include "multifd/peer_profile.hpp"

#include <doctest/doctest.h>

#include <ostream>  // lets doctest print a std::error_code
#include <set>
#include <string>

using multifd::Errc;
using multifd::PeerProfile;
using multifd::SyncStyle;

TEST_CASE("Each generation can do what format/versions.md section 15 says") {
  struct Row {
    const char* name;
    bool zero_lists, device_state, digests;
    SyncStyle sync_style;
  };
  for (const Row row : {Row{"qemu-7.2", false, false, false, SyncStyle::per_section},
                        Row{"qemu-8.0", false, false, false, SyncStyle::per_section},
                        Row{"qemu-8.1", false, false, false, SyncStyle::per_round},
                        Row{"qemu-9.0", true, false, false, SyncStyle::per_round},
                        Row{"qemu-10.0", true, true, false, SyncStyle::per_round},
                        Row{"qemu-11.0", true, true, false, SyncStyle::per_round},
                        Row{"multifd", true, true, true, SyncStyle::per_round}}) {
    CAPTURE(row.name);
    const auto profile = multifd::find_peer_profile(row.name);
    REQUIRE(profile);
    CHECK(profile->name == row.name);
    CHECK(profile->zero_lists == row.zero_lists);
    CHECK(profile->device_state == row.device_state);
    CHECK(profile->digests == row.digests);
    CHECK(profile->sync_style == row.sync_style);
  }
  CHECK(multifd::peer_profiles.size() == 7);
}

TEST_CASE("Every row has a name of its own, and the last one is our own receiver") {
  std::set<std::string_view> names;
  for (const PeerProfile& profile : multifd::peer_profiles) names.insert(profile.name);
  CHECK(names.size() == multifd::peer_profiles.size());
  CHECK(multifd::peer_multifd.name == "multifd");
}

TEST_CASE("Only our own receiver verifies digests") {
  for (const PeerProfile& profile : multifd::peer_profiles) CHECK(profile.digests == (profile.name == "multifd"));
}

TEST_CASE("An unknown peer name is refused, however near it is") {
  for (const char* name : {"", "qemu", "qemu-7", "qemu-7.20", "QEMU-7.2", "multifd ", " multifd"}) {
    CAPTURE(name);
    const auto profile = multifd::find_peer_profile(name);
    REQUIRE_FALSE(profile.has_value());
    CHECK(profile.error().code == Errc::unknown_policy);
    CHECK(profile.error().stage == multifd::Stage::setup);
  }
}

TEST_CASE("A machine type tells the oldest generation that can have it") {
  using multifd::peer_of_machine_type;
  CHECK(peer_of_machine_type("pc-i440fx-7.2").name == "qemu-7.2");
  CHECK(peer_of_machine_type("pc-q35-8.0").name == "qemu-8.0");
  CHECK(peer_of_machine_type("pc-q35-8.2").name == "qemu-8.1");
  CHECK(peer_of_machine_type("pc-q35-9.2").name == "qemu-9.0");
  CHECK(peer_of_machine_type("virt-10.0").name == "qemu-10.0");
  CHECK(peer_of_machine_type("virt-10.2").name == "qemu-10.0");
  CHECK(peer_of_machine_type("pseries-9.1").name == "qemu-9.0");
  CHECK(peer_of_machine_type("s390-ccw-virtio-10.1").name == "qemu-10.0");
  CHECK(peer_of_machine_type("pc-q35-12.1").name == "qemu-11.0");
  CHECK(peer_of_machine_type("pc-i440fx-2.4").name == "qemu-7.2");  // older than the table
}

TEST_CASE("A machine type that names no version of QEMU gets the generation that every peer is at least") {
  using multifd::peer_of_machine_type;
  using multifd::version_of_machine_type;
  CHECK(version_of_machine_type("pc-q35-10.0") == multifd::QemuVersion{10, 0});
  for (const std::string& machine : {std::string(),
                                     std::string("-"),
                                     std::string("pc"),
                                     std::string("pc-"),
                                     std::string("pc-9"),
                                     std::string("pc-9.0"),
                                     std::string("SS-10"),
                                     std::string("SS-20"),
                                     std::string("virt"),
                                     std::string("microvm"),
                                     std::string("raspi3b"),
                                     std::string("versatilepb"),
                                     std::string("x-99.0"),
                                     std::string("virt-99"),
                                     std::string("virt-.9"),
                                     std::string("virt-9."),
                                     std::string("pc-x.y"),
                                     std::string("sun4m-9.0"),
                                     std::string("pc-q35-+9.0"),
                                     std::string("pc-q35-09.0"),
                                     std::string("pc-i440fx-bionic"),
                                     std::string("pc-q35-10.0.1"),
                                     std::string("pc-q35-rhel9.6.0"),
                                     std::string("pc-q35-4294967305.0"),
                                     std::string("my-pc-q35-10.0"),
                                     "pc-q35-" + std::string(1000, '9') + ".0",
                                     "pc-q35-10." + std::string(60'000, '0'),
                                     std::string("pc-q35-10.0\0", 12)}) {
    CAPTURE(machine.substr(0, 40));
    CHECK_FALSE(version_of_machine_type(machine).has_value());
    CHECK(peer_of_machine_type(machine).name == "qemu-7.2");
    CHECK_FALSE(peer_of_machine_type(machine).zero_lists);
  }
}
