//! Compiles kernels with NVRTC for the device at hand, and keeps them on disk for the next start.

use std::ffi::{CStr, CString, c_char};
use std::fs;
use std::path::{Path, PathBuf};

use cudarc::nvrtc::result::NvrtcError;
use cudarc::nvrtc::sys;
use ulmus_types::Digest;

use super::program::{HEADERS, Variant};

/// The compiler, for one architecture.
#[derive(Debug)]
pub(super) struct Compiler {
    architecture: String,
    version: (i32, i32),
    /// The folder for compiled kernels, if there is one.
    cache: Option<PathBuf>,
}

impl Compiler {
    /// A compiler for devices with this compute capability.
    pub(super) fn new((major, minor): (i32, i32)) -> Result<Self, String> {
        // SAFETY: the function only checks whether the library can be loaded.
        if !unsafe { sys::is_culib_present() } {
            let found = "libnvrtc is not found; install CUDA 13's NVRTC or set LD_LIBRARY_PATH to it";
            return Err(found.to_owned());
        }
        let mut version = (0, 0);
        // SAFETY: both pointers are to integers that live through the call.
        unsafe { sys::nvrtcVersion(&raw mut version.0, &raw mut version.1) }
            .result()
            .map_err(|error| format!("NVRTC does not state its version: {error}"))?;
        Ok(Self { architecture: format!("sm_{major}{minor}"), version, cache: cache_folder() })
    }

    /// Version of NVRTC.
    pub(super) fn version(&self) -> (i32, i32) {
        self.version
    }

    /// The cubin of a variant, from the cache or else compiled.
    pub(super) fn compile(&self, variant: Variant) -> Result<Vec<u8>, String> {
        let options = self.options(variant);
        let file = self.cache.as_ref().map(|folder| folder.join(self.key(variant, &options)));
        if let Some(image) = file.as_ref().and_then(|file| fs::read(file).ok()) {
            return Ok(image);
        }
        let Compiled { image, log } = compile(variant, &options)?;
        tracing::debug!(file = variant.program.file(), log, "compiled");
        if let Some(file) = file
            && let Err(error) = keep(&file, &image)
        {
            tracing::debug!(file = %file.display(), %error, "a compiled kernel could not be kept");
        }
        Ok(image)
    }

    fn options(&self, variant: Variant) -> Vec<String> {
        let mut options = variant.options();
        options.push(format!("--gpu-architecture={}", self.architecture));
        options.push("--std=c++17".to_owned());
        options
    }

    /// File name for a cubin. It contains a hash of everything that decides the bytes.
    fn key(&self, variant: Variant, options: &[String]) -> String {
        let (file, source) = variant.program.source();
        let mut text = format!("{:?} {options:?}\n{source}", self.version);
        for (_, header) in HEADERS {
            text.push_str(header);
        }
        format!("{file}-{}.cubin", Digest::of(text.as_bytes()).short())
    }
}

/// `ULMUS_KERNEL_CACHE`, or else `ulmus/kernels` in the user's cache folder.
fn cache_folder() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("ULMUS_KERNEL_CACHE").or_else(|| {
        let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
        Some(cache.join("ulmus/kernels"))
    })
}

/// Writes a file completely or not at all, because other processes may write and read it at the same time.
fn keep(file: &Path, image: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder)?;
    }
    let own = file.with_extension(format!("{}.partial", std::process::id()));
    fs::write(&own, image)?;
    fs::rename(&own, file)
}

/// The compiler's output for a file: the cubin and the log.
struct Compiled {
    image: Vec<u8>,
    log: String,
}

fn compile(variant: Variant, options: &[String]) -> Result<Compiled, String> {
    let (file, source) = variant.program.source();
    tracing::debug!(file, ?options, "compiling");
    let text = |text: &str| CString::new(text).expect("sources and options have no zero byte");
    let (source, name) = (text(source), text(file));
    let headers: Vec<[CString; 2]> =
        HEADERS.iter().map(|(name, source)| [text(name), text(source)]).collect();
    let header_names: Vec<*const c_char> = headers.iter().map(|[name, _]| name.as_ptr()).collect();
    let header_sources: Vec<*const c_char> = headers.iter().map(|[_, source]| source.as_ptr()).collect();
    let options: Vec<CString> = options.iter().map(|option| text(option)).collect();
    let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
    let failed = |error: NvrtcError| format!("NVRTC reports {error}");

    let mut program = std::ptr::null_mut();
    // SAFETY: all strings are zero-terminated and live through the call, which copies them.
    unsafe {
        sys::nvrtcCreateProgram(
            &raw mut program,
            source.as_ptr(),
            name.as_ptr(),
            headers.len() as i32,
            header_sources.as_ptr(),
            header_names.as_ptr(),
        )
    }
    .result()
    .map_err(failed)?;
    let mut program = Program(program);
    // SAFETY: the program was created above, and the options are zero-terminated strings that live through the call.
    let compiled = unsafe { sys::nvrtcCompileProgram(program.0, options.len() as i32, options.as_ptr()) };
    if let Err(error) = compiled.result() {
        return Err(format!("{error}\n{}", program.log()));
    }
    let image = program.image().map_err(failed)?;
    Ok(Compiled { image, log: program.log() })
}

/// A program that is destroyed on drop.
struct Program(sys::nvrtcProgram);

impl Program {
    fn log(&self) -> String {
        let mut bytes = 0;
        // SAFETY: the program exists, and the second call writes as many bytes as the first one has reported.
        unsafe {
            if sys::nvrtcGetProgramLogSize(self.0, &raw mut bytes).result().is_err() {
                return String::new();
            }
            let mut log = vec![0_u8; bytes];
            if sys::nvrtcGetProgramLog(self.0, log.as_mut_ptr().cast()).result().is_err() {
                return String::new();
            }
            CStr::from_bytes_until_nul(&log).map(|log| log.to_string_lossy().into_owned()).unwrap_or_default()
        }
    }

    fn image(&mut self) -> Result<Vec<u8>, NvrtcError> {
        let mut bytes = 0;
        // SAFETY: the program is compiled, and the second call writes as many bytes as the first one has reported.
        unsafe {
            sys::nvrtcGetCUBINSize(self.0, &raw mut bytes).result()?;
            let mut image = vec![0_u8; bytes];
            sys::nvrtcGetCUBIN(self.0, image.as_mut_ptr().cast()).result()?;
            Ok(image)
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program was created once, and is destroyed only here.
        unsafe { sys::nvrtcDestroyProgram(&raw mut self.0) }.result().ok();
    }
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::super::{program::Program, tilings};
    use super::*;

    /// Bytes that each kernel spills to memory for lack of registers, according to the compiler's log.
    fn spilled(log: &str) -> Vec<(&str, usize)> {
        let mut kernels = Vec::new();
        for line in log.lines() {
            if let Some((_, kernel)) = line.split_once("Function properties for ") {
                kernels.push((kernel.trim(), 0));
            } else if let Some((before, _)) = line.split_once(" bytes spill loads") {
                let bytes = before.rsplit(' ').next().and_then(|bytes| bytes.parse().ok());
                kernels.last_mut().expect("a kernel is named first").1 = bytes.expect("a number");
            }
        }
        kernels
    }

    /// Whether a kernel is used in this variant: the kernels of attention have different block shapes.
    fn is_used(variant: Variant, kernel: &str) -> bool {
        let Program::Attention { head, tiling } = variant.program else { return true };
        let of = tilings(head).unwrap();
        match kernel {
            "attention" => of.forward == tiling,
            "attention_backward_queries" => of.queries == tiling,
            "attention_backward_keys" => of.keys == tiling,
            _ => true,
        }
    }

    /// Compiles every kernel that the published models use, for A100, RTX 40 and H100. Kernels may spill only a few
    /// registers, because spilling costs as much as the rest of an inner loop.
    #[test]
    #[ignore = "needs NVRTC: .ci/run cuda"]
    fn everything_compiles_for_every_architecture_and_stays_in_registers() {
        const MAX_SPILLED: usize = 112;
        let compilers = [(8, 0), (8, 9), (9, 0)]
            .map(|capability| Compiler { cache: None, ..Compiler::new(capability).unwrap() });
        let all: Vec<_> = Variant::published()
            .into_iter()
            .flat_map(|variant| compilers.iter().map(move |compiler| (compiler, variant)))
            .collect();
        let each = all.into_par_iter().flat_map_iter(|(compiler, variant)| {
            let mut options = compiler.options(variant);
            options.push("--ptxas-options=-v".to_owned());
            let Compiled { image, log } =
                compile(variant, &options).unwrap_or_else(|problem| panic!("{variant:?}: {problem}"));
            assert!(image.starts_with(b"\x7fELF"), "{variant:?} is not a cubin");
            let kernels = spilled(&log);
            assert!(!kernels.is_empty(), "{variant:?}: {log}");
            let spilling = kernels
                .into_iter()
                .filter(|(kernel, bytes)| *bytes > MAX_SPILLED && is_used(variant, kernel));
            let tell = |(kernel, bytes): (&str, usize)| {
                format!("{kernel} of {variant:?}, {}: {bytes} bytes", compiler.architecture)
            };
            spilling.map(tell).collect::<Vec<_>>()
        });
        let spilling: Vec<String> = each.collect();
        assert!(spilling.is_empty(), "{}", spilling.join("\n"));
    }
}
