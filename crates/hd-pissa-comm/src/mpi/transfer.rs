//! The calls into MPI: messages of bytes to and from another process, none of which block.

#![allow(unsafe_code)]

use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::raw::{c_char, c_int};
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;

use mpi_sys as ffi;

use crate::CommError;

/// MPI counts bytes in a C `int`: longer messages travel in pieces.
const PIECE: usize = 1 << 30;
const SUCCESS: c_int = ffi::MPI_SUCCESS as c_int;

/// The kind of a message, as MPI's tag.
#[derive(Clone, Copy, Debug)]
pub(super) enum Tag {
    Header = 1,
    Payload = 2,
    Farewell = 3,
}

/// The processes that the launcher started.
///
/// Dropping it leaves MPI as it is. [`finalize`](Self::finalize) shuts MPI down, which waits for
/// every other process.
pub(super) struct World {
    main: MainThread,
    comm: ffi::MPI_Comm,
    pub(super) index: usize,
    pub(super) size: usize,
}

// SAFETY: MPI is initialized for calls from any thread, one at a time (`MPI_THREAD_SERIALIZED`).
// There is one `World`, nothing here can be shared between threads, and its handles refer to
// nothing local to a thread.
unsafe impl Send for World {}

impl World {
    pub(super) fn init() -> Result<Self, CommError> {
        let unavailable = |reason: &str| CommError::Unavailable {
            reason: reason.into(),
        };
        // MPI allows only one initialization.
        static INITIALIZED: AtomicBool = AtomicBool::new(false);
        let mut before: c_int = 0;
        // SAFETY: may be called at any time, with a valid place for the result.
        unsafe { ffi::MPI_Initialized(&mut before) };
        if INITIALIZED.swap(true, Ordering::SeqCst) || before != 0 {
            return Err(unavailable("MPI is already initialized in this process"));
        }
        let main = MainThread::start().map_err(|reason| unavailable(&reason))?;
        let (mut index, mut size): (c_int, c_int) = (0, 0);
        // SAFETY: MPI is initialized, and the results have valid places.
        let comm = unsafe {
            let comm = ffi::RSMPI_COMM_WORLD;
            // By default MPI ends the process on a failed transfer. We report an error instead.
            ffi::MPI_Comm_set_errhandler(comm, ffi::RSMPI_ERRORS_RETURN);
            ffi::MPI_Comm_rank(comm, &mut index);
            ffi::MPI_Comm_size(comm, &mut size);
            comm
        };
        Ok(Self {
            main,
            comm,
            index: index as usize,
            size: size as usize,
        })
    }

    /// Starts to send a part of `bytes` to `peer`.
    pub(super) fn send(
        &self,
        peer: usize,
        tag: Tag,
        bytes: Arc<Vec<u8>>,
        part: Range<usize>,
    ) -> Transfer {
        let (start, len) = (bytes[part.clone()].as_ptr(), part.len());
        let mut transfer = Transfer::new([self.index, peer], bytes);
        for (offset, count) in pieces(len) {
            let mut request = null_request();
            // SAFETY: the piece lies within the buffer, which nobody writes to while it is shared
            // and which `transfer` keeps alive until MPI is done with it, or until the process ends.
            let code = unsafe {
                ffi::MPI_Isend(
                    start.add(offset).cast(),
                    count,
                    ffi::RSMPI_UINT8_T,
                    peer as c_int,
                    tag as c_int,
                    self.comm,
                    &mut request,
                )
            };
            transfer.push(code, request);
        }
        transfer
    }

    /// Starts to receive `len` bytes from `peer`.
    pub(super) fn receive(&self, peer: usize, tag: Tag, len: usize) -> Transfer {
        let mut bytes = vec![0u8; len];
        let start = bytes.as_mut_ptr();
        let mut transfer = Transfer::new([self.index, peer], Arc::new(bytes));
        for (offset, count) in pieces(len) {
            let mut request = null_request();
            // SAFETY: the piece lies within the buffer, which `transfer` hands out only once MPI
            // is done with it, and else keeps alive until the process ends.
            let code = unsafe {
                ffi::MPI_Irecv(
                    start.add(offset).cast(),
                    count,
                    ffi::RSMPI_UINT8_T,
                    peer as c_int,
                    tag as c_int,
                    self.comm,
                    &mut request,
                )
            };
            transfer.push(code, request);
        }
        transfer
    }

    /// Name of the machine this process runs on.
    pub(super) fn machine(&self) -> Vec<u8> {
        text(ffi::MPI_MAX_PROCESSOR_NAME, |place, len| {
            // SAFETY: MPI is initialized, and the place is as long as it asks for.
            unsafe { ffi::MPI_Get_processor_name(place, len) };
        })
    }

    /// Shuts MPI down, which waits for every other process to do the same.
    pub(super) fn finalize(self) {
        self.main.finalize();
    }
}

/// MPI's main thread. It initializes MPI, and only this thread may shut it down.
///
/// A communicator may be dropped on another thread than the one that made it, and that thread may
/// have ended. This thread therefore exists only for the two calls, and sleeps between them. If it
/// is dropped without [`finalize`](Self::finalize), it ends and leaves MPI as it is.
struct MainThread {
    thread: JoinHandle<()>,
    /// Tells it to shut MPI down.
    finalize: Sender<()>,
}

impl MainThread {
    /// Initializes MPI, which must not be initialized yet. Returns the reason if that fails.
    fn start() -> Result<Self, String> {
        let (report, initialized) = mpsc::channel();
        let (finalize, shut_down) = mpsc::channel();
        let work = move || {
            let result = initialize();
            let usable = result.is_ok();
            if report.send(result).is_ok() && usable && shut_down.recv().is_ok() {
                // SAFETY: MPI is initialized, by this thread, and `World`, the only way to it, is
                // gone.
                unsafe { ffi::MPI_Finalize() };
            }
        };
        let thread = std::thread::Builder::new()
            .name("mpi".into())
            .spawn(work)
            .map_err(|error| format!("no thread for MPI: {error}"))?;
        initialized
            .recv()
            .unwrap_or_else(|_| Err("the thread of MPI ended".into()))?;
        Ok(Self { thread, finalize })
    }

    /// Shuts MPI down, and returns when that is done.
    fn finalize(self) {
        // It cannot have ended, because it waits for this.
        let _ = self.finalize.send(());
        let _ = self.thread.join();
    }
}

/// Initializes MPI for calls from any thread, one at a time. Returns the reason if that fails.
fn initialize() -> Result<(), String> {
    let mut threading: c_int = 0;
    // SAFETY: MPI is not initialized; it takes null for the arguments of the program.
    let code = unsafe {
        ffi::MPI_Init_thread(
            null_mut(),
            null_mut(),
            ffi::RSMPI_THREAD_SERIALIZED,
            &mut threading,
        )
    };
    if code != SUCCESS {
        return Err(describe(code));
    }
    // SAFETY: a constant of the library.
    if threading < unsafe { ffi::RSMPI_THREAD_SERIALIZED } {
        return Err("this MPI library was built without support for threads".into());
    }
    Ok(())
}

fn null_request() -> ffi::MPI_Request {
    // SAFETY: a constant of the library.
    unsafe { ffi::RSMPI_REQUEST_NULL }
}

/// Offset and length of each piece of a message of `len` bytes. An empty message has one empty
/// piece.
fn pieces(len: usize) -> impl Iterator<Item = (usize, c_int)> {
    (0..len.max(1))
        .step_by(PIECE)
        .map(move |offset| (offset, (len - offset).min(PIECE) as c_int))
}

/// A message on its way.
///
/// If it is dropped before it is complete, it leaves its buffer to MPI, which may still use it:
/// cancelling a transfer whose other end is gone may never return.
pub(super) struct Transfer {
    /// This worker and the other one.
    ends: [usize; 2],
    pending: Vec<ffi::MPI_Request>,
    bytes: ManuallyDrop<Arc<Vec<u8>>>,
    failed: Option<CommError>,
}

// SAFETY: as for `World`.
unsafe impl Send for Transfer {}

impl Transfer {
    fn new(ends: [usize; 2], bytes: Arc<Vec<u8>>) -> Self {
        Self {
            ends,
            pending: Vec::new(),
            bytes: ManuallyDrop::new(bytes),
            failed: None,
        }
    }

    fn push(&mut self, code: c_int, request: ffi::MPI_Request) {
        self.pending.push(request);
        self.check(code);
    }

    fn check(&mut self, code: c_int) {
        if code != SUCCESS {
            self.failed.get_or_insert(CommError::Transfer {
                workers: self.ends,
                reason: describe(code),
            });
        }
    }

    /// Whether the message is complete. The call lets MPI move it.
    pub(super) fn poll(&mut self) -> Result<bool, CommError> {
        while self.failed.is_none() && !self.pending.is_empty() {
            let mut done: c_int = 0;
            // SAFETY: the request was started and is not complete; its buffer is alive.
            let code =
                unsafe { ffi::MPI_Test(&mut self.pending[0], &mut done, ffi::RSMPI_STATUS_IGNORE) };
            self.check(code);
            if done == 0 {
                break;
            }
            self.pending.remove(0);
        }
        match &self.failed {
            Some(error) => Err(error.clone()),
            None => Ok(self.pending.is_empty()),
        }
    }

    /// The bytes received.
    ///
    /// # Panics
    ///
    /// If the message is not complete.
    pub(super) fn into_bytes(mut self) -> Vec<u8> {
        assert!(self.pending.is_empty(), "a message that is complete");
        std::mem::take(Arc::get_mut(&mut self.bytes).expect("nobody shares a received message"))
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        if self.pending.is_empty() {
            // SAFETY: done once, and nothing uses the field afterwards.
            unsafe {
                ManuallyDrop::drop(&mut self.bytes);
            }
        }
    }
}

/// MPI's text for an error code.
fn describe(code: c_int) -> String {
    let text = text(ffi::MPI_MAX_ERROR_STRING, |place, len| {
        // SAFETY: the place is as long as MPI asks for.
        unsafe { ffi::MPI_Error_string(code, place, len) };
    });
    String::from_utf8_lossy(&text).into_owned()
}

/// The text that MPI writes into a buffer of `longest` characters.
fn text(longest: u32, write: impl FnOnce(*mut c_char, &mut c_int)) -> Vec<u8> {
    let mut bytes = vec![0u8; longest as usize];
    let mut len: c_int = 0;
    write(bytes.as_mut_ptr().cast(), &mut len);
    bytes.truncate(len as usize);
    bytes
}
