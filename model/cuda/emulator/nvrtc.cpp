// libnvrtc for machines without a GPU: compiles CUDA C++ with the C++ compiler, to a shared object that the emulated
// driver loads.
//
// First the preprocessor runs, then a description for the driver is added for every kernel in its output, and then the
// result is compiled. ULMUS_EMULATOR_CXX names another compiler than g++.
#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <dlfcn.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#define API extern "C" __attribute__((visibility("default")))

enum nvrtcResult {
    NVRTC_SUCCESS = 0,
    NVRTC_ERROR_OUT_OF_MEMORY = 1,
    NVRTC_ERROR_PROGRAM_CREATION_FAILURE = 2,
    NVRTC_ERROR_INVALID_INPUT = 3,
    NVRTC_ERROR_INVALID_PROGRAM = 4,
    NVRTC_ERROR_INVALID_OPTION = 5,
    NVRTC_ERROR_COMPILATION = 6,
    NVRTC_ERROR_INTERNAL_ERROR = 11,
};

namespace fs = std::filesystem;
using Strings = std::vector<std::string>;

struct Program {
    std::string name, source;
    std::map<std::string, std::string> headers;
    std::string log, module;
};

namespace {

std::string read_file(const fs::path &path) {
    std::ifstream file(path, std::ios::binary);
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
}

void write_file(const fs::path &path, const std::string &text) {
    fs::create_directories(path.parent_path());
    std::ofstream(path, std::ios::binary) << text;
}

// The folder of the headers for kernels, beside this library.
std::string include_folder() {
    Dl_info info;
    if (!dladdr(reinterpret_cast<void *>(&include_folder), &info)) return "include";
    return (fs::absolute(info.dli_fname).parent_path() / "include").string();
}

class TemporaryFolder {
  public:
    TemporaryFolder() {
        std::string pattern = (fs::temp_directory_path() / "emulated-nvrtc-XXXXXX").string();
        if (mkdtemp(pattern.data())) path = pattern;
    }
    ~TemporaryFolder() {
        std::error_code ignored;
        if (!path.empty()) fs::remove_all(path, ignored);
    }
    TemporaryFolder(const TemporaryFolder &) = delete;

    fs::path path;
};

// Runs the compiler in a folder. Its messages go to the file `log` there.
bool run_compiler(const fs::path &folder, Strings arguments) {
    const char *compiler = std::getenv("ULMUS_EMULATOR_CXX");
    arguments.insert(arguments.begin(), compiler ? compiler : "g++");
    std::vector<char *> pointers;
    for (std::string &argument : arguments) pointers.push_back(argument.data());
    pointers.push_back(nullptr);

    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addchdir_np(&actions, folder.c_str());
    posix_spawn_file_actions_addopen(&actions, 1, "log", O_WRONLY | O_CREAT | O_APPEND, 0600);
    posix_spawn_file_actions_adddup2(&actions, 1, 2);
    pid_t process;
    int error = posix_spawnp(&process, pointers[0], &actions, nullptr, pointers.data(), environ);
    posix_spawn_file_actions_destroy(&actions);
    if (error != 0) {
        write_file(folder / "log", arguments[0] + ": " + std::strerror(error) + "\n");
        return false;
    }
    int status;
    while (waitpid(process, &status, 0) < 0 && errno == EINTR) {}
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

bool starts_with(const std::string &text, const std::string &start) { return text.rfind(start, 0) == 0; }

// The options that define macros and name folders of headers.
Strings kept_options(const Strings &options) {
    const std::pair<const char *, const char *> LONG_FORMS[] = {
        {"--define-macro=", "-D"}, {"--undefine-macro=", "-U"}, {"--include-path=", "-I"}};
    Strings kept;
    for (std::size_t i = 0; i < options.size(); i++) {
        const std::string &option = options[i];
        for (const auto &[start, letter] : LONG_FORMS)
            if (starts_with(option, start)) kept.push_back(letter + option.substr(std::strlen(start)));
        if (!starts_with(option, "-D") && !starts_with(option, "-U") && !starts_with(option, "-I")) continue;
        bool separate = option.size() == 2 && i + 1 < options.size();
        kept.push_back(separate ? option + options[++i] : option);
    }
    return kept;
}

struct KernelName {
    std::string name, max_threads;
};

// Reads a declaration that follows `__global__` in preprocessed text.
class Declaration {
  public:
    Declaration(const std::string &text, std::size_t position) : text_(text), position_(position) {}

    // The kernel's name is the last word before the parameters.
    KernelName read() {
        KernelName kernel = {"", "0"};
        while (true) {
            std::string word = read_word();
            if (word == "__launch_bounds__")
                kernel.max_threads = first_argument();
            else if (word.empty())
                return kernel;
            else
                kernel.name = word;
        }
    }

  private:
    void skip_space() {
        while (position_ < text_.size()) {
            bool line_marker = text_[position_] == '#' && text_[position_ - 1] == '\n';
            if (line_marker)
                position_ = std::min(text_.find('\n', position_), text_.size());
            else if (std::isspace(static_cast<unsigned char>(text_[position_])))
                position_++;
            else
                return;
        }
    }

    // The next word, or an empty one if something else follows.
    std::string read_word() {
        skip_space();
        std::size_t begin = position_;
        while (position_ < text_.size() && (std::isalnum(static_cast<unsigned char>(text_[position_])) ||
                                            text_[position_] == '_'))
            position_++;
        return text_.substr(begin, position_ - begin);
    }

    // The first of several arguments in parentheses. Continues after them.
    std::string first_argument() {
        skip_space();
        std::string argument;
        bool first = true;
        int depth = 0;
        for (; position_ < text_.size(); position_++) {
            char c = text_[position_];
            if (c == '(' && depth++ == 0) continue;
            if (c == ')' && --depth == 0) break;
            if (c == ',' && depth == 1) first = false;
            if (first) argument += c;
        }
        position_++;
        return argument;
    }

    const std::string &text_;
    std::size_t position_;
};

// Macros that the preprocessed text still needs. The driver looks for a kernel's description.
const char *const DEFINES = R"(
#define __global__
#define __launch_bounds__(...)
#define ULMUS_KERNEL(name, max_threads) \
    extern "C" __attribute__((visibility("default"))) const ulmus::Kernel ulmus_kernel_##name = \
        ulmus::Caller<&name>::describe(max_threads);
)";

// Descriptions of all kernels in preprocessed text. Templates are not supported as kernels.
std::string describe_kernels(const std::string &text) {
    const std::string MARK = "__global__";
    std::set<std::string> names;
    std::string descriptions;
    for (std::size_t at = text.find(MARK); at != std::string::npos; at = text.find(MARK, at + 1)) {
        std::size_t before = text.find_last_not_of(" \t\n", at - 1);
        if (before != std::string::npos && text[before] == '>') continue;
        KernelName kernel = Declaration(text, at + MARK.size()).read();
        if (!kernel.name.empty() && names.insert(kernel.name).second)
            descriptions += "ULMUS_KERNEL(" + kernel.name + ", (" + kernel.max_threads + "))\n";
    }
    return descriptions;
}

// Products and sums are rounded separately, as with NVRTC's --fmad=false, and fmaf is one instruction.
const Strings COMPILE = {"-std=c++17", "-O2", "-w", "-fPIC", "-shared", "-march=x86-64-v3", "-ffp-contract=off",
                         "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing", "-fwrapv",
                         "-fvisibility=hidden", "-fno-gnu-unique", "-fno-exceptions", "-x", "c++"};

Strings operator+(Strings a, const Strings &b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
}

nvrtcResult compile(Program &program, const Strings &options) {
    TemporaryFolder folder;
    if (folder.path.empty()) return NVRTC_ERROR_INTERNAL_ERROR;
    std::string name = fs::path(program.name).filename().string();
    if (name.empty()) name = "program.cu";
    write_file(folder.path / name, program.source);
    for (const auto &[header, text] : program.headers)
        if (header != "intrinsics.cuh") write_file(folder.path / header, text);

    std::string include = include_folder();
    Strings preprocess = COMPILE + Strings{"-E", "-I", include, "-include", "device.h"} +
                         kept_options(options) + Strings{name, "-o", "preprocessed"};
    bool done = run_compiler(folder.path, preprocess);
    if (done) {
        std::string text = read_file(folder.path / "preprocessed");
        write_file(folder.path / "kernels.cpp", DEFINES + text + "\n" + describe_kernels(text));
        done = run_compiler(folder.path, COMPILE + Strings{"kernels.cpp", "-o", "module"});
        if (done) program.module = read_file(folder.path / "module");
    }
    program.log = read_file(folder.path / "log");
    return done ? NVRTC_SUCCESS : NVRTC_ERROR_COMPILATION;
}

} // namespace

API const char *nvrtcGetErrorString(nvrtcResult result) {
    switch (result) {
    case NVRTC_SUCCESS: return "NVRTC_SUCCESS";
    case NVRTC_ERROR_OUT_OF_MEMORY: return "NVRTC_ERROR_OUT_OF_MEMORY";
    case NVRTC_ERROR_PROGRAM_CREATION_FAILURE: return "NVRTC_ERROR_PROGRAM_CREATION_FAILURE";
    case NVRTC_ERROR_INVALID_INPUT: return "NVRTC_ERROR_INVALID_INPUT";
    case NVRTC_ERROR_INVALID_PROGRAM: return "NVRTC_ERROR_INVALID_PROGRAM";
    case NVRTC_ERROR_INVALID_OPTION: return "NVRTC_ERROR_INVALID_OPTION";
    case NVRTC_ERROR_COMPILATION: return "NVRTC_ERROR_COMPILATION";
    case NVRTC_ERROR_INTERNAL_ERROR: return "NVRTC_ERROR_INTERNAL_ERROR";
    }
    return "NVRTC_ERROR unknown";
}

// A version that no real compiler has: programs cache compiled kernels by version, and must not mix them up.
API nvrtcResult nvrtcVersion(int *major, int *minor) {
    *major = 13;
    *minor = 99;
    return NVRTC_SUCCESS;
}

API nvrtcResult nvrtcCreateProgram(Program **program, const char *source, const char *name, int header_count,
                                   const char *const *headers, const char *const *include_names) {
    if (!program || !source) return NVRTC_ERROR_INVALID_INPUT;
    *program = new Program{name ? name : "", source, {}, "", ""};
    for (int i = 0; i < header_count; i++) (*program)->headers[include_names[i]] = headers[i];
    return NVRTC_SUCCESS;
}

API nvrtcResult nvrtcDestroyProgram(Program **program) {
    if (!program || !*program) return NVRTC_ERROR_INVALID_PROGRAM;
    delete *program;
    *program = nullptr;
    return NVRTC_SUCCESS;
}

API nvrtcResult nvrtcCompileProgram(Program *program, int count, const char *const *options) {
    if (!program) return NVRTC_ERROR_INVALID_PROGRAM;
    return compile(*program, Strings(options, options + count));
}

API nvrtcResult nvrtcGetCUBINSize(Program *program, std::size_t *size) {
    if (!program || program->module.empty()) return NVRTC_ERROR_INVALID_PROGRAM;
    *size = program->module.size();
    return NVRTC_SUCCESS;
}

API nvrtcResult nvrtcGetCUBIN(Program *program, char *module) {
    if (!program || program->module.empty()) return NVRTC_ERROR_INVALID_PROGRAM;
    std::memcpy(module, program->module.data(), program->module.size());
    return NVRTC_SUCCESS;
}

// The size of the log includes the zero at its end.
API nvrtcResult nvrtcGetProgramLogSize(Program *program, std::size_t *size) {
    if (!program) return NVRTC_ERROR_INVALID_PROGRAM;
    *size = program->log.size() + 1;
    return NVRTC_SUCCESS;
}

API nvrtcResult nvrtcGetProgramLog(Program *program, char *log) {
    if (!program) return NVRTC_ERROR_INVALID_PROGRAM;
    std::memcpy(log, program->log.c_str(), program->log.size() + 1);
    return NVRTC_SUCCESS;
}
