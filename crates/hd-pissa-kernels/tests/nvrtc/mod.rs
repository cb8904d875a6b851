//! NVRTC, loaded at run time: CUDA C++ to machine code, without a GPU.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr::null;

use libloading::Library;

type Program = *mut c_void;

#[derive(Debug, thiserror::Error)]
pub enum NvrtcError {
    #[error(
        "no libnvrtc with CUDA headers was found: install the Python packages nvidia-cuda-nvrtc, \
         nvidia-cuda-runtime and nvidia-cuda-crt, or name a folder that holds them in \
         HD_PISSA_NVRTC"
    )]
    Missing,
    #[error("libnvrtc does not load: {0}")]
    Load(#[from] libloading::Error),
    #[error("NVRTC refused the source:\n{0}")]
    Compile(String),
}

/// The assembler's report of one kernel.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    pub registers: u64,
    pub spill_bytes: u64,
    pub stack_bytes: u64,
    pub shared_bytes: u64,
    pub cubin_bytes: usize,
}

/// Whether the environment names the folder of NVRTC.
pub fn is_named() -> bool {
    std::env::var_os("HD_PISSA_NVRTC").is_some()
}

pub struct Nvrtc {
    nvrtc: Library,
    includes: Vec<PathBuf>,
}

impl Nvrtc {
    pub fn find() -> Result<Self, NvrtcError> {
        let roots = match std::env::var_os("HD_PISSA_NVRTC") {
            Some(root) => vec![PathBuf::from(root)],
            None => site_packages(),
        };
        for root in roots {
            let (mut libraries, mut includes) = (Vec::new(), Vec::new());
            walk(&root, 5, &mut |file| {
                let name = file
                    .file_name()
                    .and_then(|name| name.to_str())
                    .unwrap_or_default();
                if name.starts_with("libnvrtc.so") {
                    libraries.push(file.to_path_buf());
                } else if ["cuda_fp16.h", "cuda_runtime.h", "vector_types.h"].contains(&name) {
                    includes.extend(file.parent().map(Path::to_path_buf));
                }
            });
            includes.sort();
            includes.dedup();
            if let (Some(library), false) = (libraries.first(), includes.is_empty()) {
                // SAFETY: NVIDIA's compiler has no initializer with requirements of its own.
                let nvrtc = unsafe { Library::new(library)? };
                return Ok(Self { nvrtc, includes });
            }
        }
        Err(NvrtcError::Missing)
    }

    /// Compiles one source for one architecture.
    pub fn compile(&self, source: &str, architecture: &str) -> Result<Usage, NvrtcError> {
        let options: Vec<CString> = [
            format!("--gpu-architecture={architecture}"),
            "--ptxas-options=-v".into(),
        ]
        .into_iter()
        .chain(
            self.includes
                .iter()
                .map(|path| format!("--include-path={}", path.display())),
        )
        .map(c_string)
        .collect();
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let source = c_string(source.to_string());
        // SAFETY: the signatures are those of nvrtc.h; every pointer outlives its call; the log
        // buffer has the size that NVRTC asks for and NVRTC ends it with a zero.
        unsafe {
            type Create = unsafe extern "C" fn(
                *mut Program,
                *const c_char,
                *const c_char,
                c_int,
                *const *const c_char,
                *const *const c_char,
            ) -> c_int;
            type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
            type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
            type Text = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
            type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;

            let create = self.nvrtc.get::<Create>(b"nvrtcCreateProgram")?;
            let compile = self.nvrtc.get::<Compile>(b"nvrtcCompileProgram")?;
            let log_size = self.nvrtc.get::<Size>(b"nvrtcGetProgramLogSize")?;
            let log_text = self.nvrtc.get::<Text>(b"nvrtcGetProgramLog")?;
            let cubin_size = self.nvrtc.get::<Size>(b"nvrtcGetCUBINSize")?;
            let destroy = self.nvrtc.get::<Destroy>(b"nvrtcDestroyProgram")?;

            let mut program: Program = std::ptr::null_mut();
            let status = create(&mut program, source.as_ptr(), null(), 0, null(), null());
            if status != 0 {
                return Err(NvrtcError::Compile(format!("status {status}")));
            }
            let status = compile(program, options.len() as c_int, options.as_ptr());
            let mut size = 0;
            log_size(program, &mut size);
            let mut log = vec![0u8; size.max(1)];
            log_text(program, log.as_mut_ptr().cast());
            let log = CStr::from_bytes_until_nul(&log)
                .map(|log| log.to_string_lossy().into_owned())
                .unwrap_or_default();
            let mut cubin = 0;
            if status == 0 {
                cubin_size(program, &mut cubin);
            }
            destroy(&mut program);
            if status != 0 {
                return Err(NvrtcError::Compile(log));
            }
            Ok(Usage {
                cubin_bytes: cubin,
                ..usage(&log)?
            })
        }
    }
}

fn c_string(text: String) -> CString {
    CString::new(text).expect("neither options nor sources hold a zero byte")
}

/// Reads the output of `--ptxas-options=-v`. A log without the figures is an error, because it
/// could hide a spill.
fn usage(log: &str) -> Result<Usage, NvrtcError> {
    let before = |unit: &str| {
        let end = log.find(unit)?;
        let digits = log[..end]
            .rsplit(|c: char| !c.is_ascii_digit())
            .find(|d| !d.is_empty())?;
        digits.parse::<u64>().ok()
    };
    let figures = || {
        Some(Usage {
            registers: before(" registers")?,
            spill_bytes: before(" bytes spill stores")? + before(" bytes spill loads")?,
            stack_bytes: before(" bytes stack frame")?,
            // Absent if a kernel has none.
            shared_bytes: before(" bytes smem").unwrap_or(0),
            cubin_bytes: 0,
        })
    };
    figures().ok_or_else(|| NvrtcError::Compile(format!("no figures in the log:\n{log}")))
}

fn site_packages() -> Vec<PathBuf> {
    let script =
        "import site; print('\\n'.join(site.getsitepackages() + [site.getusersitepackages()]))";
    Command::new("python3")
        .args(["-c", script])
        .output()
        .map(|output| {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            text.lines()
                .map(|line| PathBuf::from(line).join("nvidia"))
                .collect()
        })
        .unwrap_or_default()
}

fn walk(folder: &Path, depth: usize, visit: &mut impl FnMut(&Path)) {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        if !path.is_dir() {
            visit(&path);
        } else if depth > 0 {
            walk(&path, depth - 1, visit);
        }
    }
}
