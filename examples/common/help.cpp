// SPDX-License-Identifier: MIT
#include "common/help.hpp"

#include <CLI/CLI.hpp>

#include <algorithm>
#include <memory>
#include <sstream>
#include <string>
#include <string_view>

namespace program {
namespace {

constexpr std::size_t columns = 80;

/// `text` in lines, behind `indent` columns each but the first, which begins at column `at`. A line ends at a space, or
/// behind the comma of a list without spaces.
std::string wrap(std::string_view text, std::size_t at, std::size_t indent) {
  std::string wrapped;
  for (;;) {
    const std::size_t room = columns - at;
    if (text.size() <= room) return wrapped.append(text);
    std::size_t end = text.rfind(' ', room);
    if (end == text.npos || end == 0) end = text.rfind(',', room - 1) + 1;
    if (end == 0) return wrapped.append(text);
    wrapped.append(text.substr(0, end)).append("\n").append(indent, ' ');
    text.remove_prefix(text[end] == ' ' ? end + 1 : end);
    at = indent;
  }
}

/// The same for paragraphs. Lines that begin with a space are kept as they are.
std::string wrap_paragraphs(const std::string& text) {
  std::string wrapped, paragraph;
  const auto end_paragraph = [&] {
    if (!paragraph.empty()) wrapped += wrap(paragraph, 0, 0) + "\n";
    paragraph.clear();
  };
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.empty() || line[0] == ' ') {
      end_paragraph();
      wrapped += line + "\n";
    } else {
      paragraph += (paragraph.empty() ? "" : " ") + line;
    }
  }
  end_paragraph();
  return wrapped;
}

class Formatter : public CLI::Formatter {
 public:
  std::string make_description(const CLI::App* app) const override { return wrap_paragraphs(app->get_description()); }
  std::string make_footer(const CLI::App* app) const override {
    const std::string footer = app->get_footer();
    return footer.empty() ? footer : "\n" + wrap_paragraphs(footer);
  }
  std::string make_option(const CLI::Option* option, bool is_positional) const override {
    const std::size_t column = get_column_width();
    const std::string name = "  " + make_option_name(option, is_positional) + opts_of(option);
    std::string text = wrap(name, 0, 6);
    const bool fits = text.size() < column;
    text += fits ? std::string(column - text.size(), ' ') : "\n" + std::string(column, ' ');
    return text + wrap(make_option_desc(option), column, column) + "\n";
  }

 private:
  /// Without the type where the check behind it says more: "UINT:UINT in [1 - 255]", "TEXT:{none,zstd}".
  std::string opts_of(const CLI::Option* option) const {
    std::string text = make_option_opts(option);
    for (const auto& [twice, once] : {std::pair{"UINT:UINT in", "UINT in"},
                                      {"SIZE:UINT in", "SIZE in"},
                                      {"FLOAT:FLOAT in", "FLOAT in"},
                                      {"FLOAT:POSITIVE", "FLOAT"},
                                      {"TEXT:{", "{"}})
      if (const std::size_t at = text.find(twice); at != text.npos)
        text.replace(at, std::string_view(twice).size(), once);
    return text;
  }
};

}  // namespace

void set_help(CLI::App& app) { app.formatter(std::make_shared<Formatter>()); }

}  // namespace program
