//! No image of this process' memory on disk: there are private keys in it.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Lets a crash write no core file. On Linux the process is also made not dumpable: then no core
/// goes to a handler either (systemd-coredump, apport), and other processes of the same user can
/// neither attach to it nor read its memory; only root can. A debugger or `perf` needs it off.
///
/// It does not hide memory from root, from swap or from a hypervisor. Children are dumpable
/// again, with the core limit at 0; they may raise it.
pub fn forbid() {
    let limit = Rlimit {
        current: Some(0),
        maximum: getrlimit(Resource::Core).maximum,
    };
    if let Err(error) = setrlimit(Resource::Core, limit) {
        tracing::warn!(%error, "core files cannot be turned off: they would hold private keys");
    }
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{DumpableBehavior, set_dumpable_behavior};
        if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
            tracing::warn!(%error, "core dumps cannot be turned off: they would hold private keys");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn nothing_is_dumped_and_nobody_may_look() {
        use rustix::process::{DumpableBehavior, dumpable_behavior};
        forbid();
        assert_eq!(getrlimit(Resource::Core).current, Some(0));
        let behavior = dumpable_behavior().unwrap();
        assert_eq!(behavior, DumpableBehavior::NotDumpable);
    }
}
