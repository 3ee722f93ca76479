// SPDX-License-Identifier: MIT
//
// The main() of every doctest binary, compiled once.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdio>

#include "support/skip.hpp"

namespace {

bool case_skipped = false;
unsigned skipped_cases = 0;
bool nothing_ran = false;

struct CountSkipped : doctest::IReporter {
  explicit CountSkipped(const doctest::ContextOptions&) {}
  void test_case_start(const doctest::TestCaseData&) override { case_skipped = false; }
  void test_case_end(const doctest::CurrentTestCaseStats&) override { skipped_cases += case_skipped; }
  void test_run_end(const doctest::TestRunStats& run) override {
    nothing_ran = skipped_cases > 0 && skipped_cases == run.numTestCasesPassingFilters;
  }

  void report_query(const doctest::QueryData&) override {}
  void test_run_start() override {}
  void test_case_reenter(const doctest::TestCaseData&) override {}
  void test_case_exception(const doctest::TestCaseException&) override {}
  void subcase_start(const doctest::SubcaseSignature&) override {}
  void subcase_end() override {}
  void log_assert(const doctest::AssertData&) override {}
  void log_message(const doctest::MessageData&) override {}
  void test_case_skipped(const doctest::TestCaseData&) override {}
};
REGISTER_LISTENER("count_skipped", 1, CountSkipped);

}  // namespace

void test::skip(const std::string& why) {
  std::printf("skipped: %s\n", why.c_str());
  std::fflush(stdout);
  case_skipped = true;
}

int main(int argc, char** argv) {
  doctest::Context context(argc, argv);
  const int result = context.run();
  return result == 0 && nothing_ran ? 77 : result;
}
