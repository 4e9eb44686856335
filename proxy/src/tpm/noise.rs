//! The TSS's own log.

/// Switches off what libtss2 prints on stderr, unless the environment sets `TSS2_LOG`. Every failure reaches us as a
/// typed error with its code; the library's lines beside it only repeat it.
///
/// Call it first in `main`: the library reads its environment, and changing that is sound only while no other thread
/// can read it. With more than one thread running this changes nothing and returns false.
pub fn silence_tss_log() -> bool {
    if std::env::var_os("TSS2_LOG").is_some() {
        return true;
    }
    let alone = std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() == 1);
    if alone {
        #[allow(unsafe_code)]
        // SAFETY: this is the process's only thread, as counted above, so nothing reads the environment meanwhile and
        // nobody can start another thread before we return.
        unsafe {
            std::env::set_var("TSS2_LOG", "all+none");
        }
    }
    alone
}
