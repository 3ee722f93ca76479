// SPDX-License-Identifier: MIT
//
// How --help looks: 80 columns, which the parser's own text is not bound to.
#pragma once

namespace CLI {
class App;
}

namespace program {

/// Sets the form of `app`'s --help. run() does.
void set_help(CLI::App& app);

}  // namespace program
