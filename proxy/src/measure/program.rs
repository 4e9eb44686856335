//! QEMU's program: by far the longest of a VM's parts to read, and known as soon as somebody listens at the monitor. Its digest is
//! begun then, while QEMU makes its machine. What counts is the program that the process runs when it is measured: if that is
//! another file by then, or the file has changed, it is read again.

use onequote_evidence::{
    digest::FileDigestAlg,
    event::{Component, Role},
};
use tokio::{sync::oneshot, task::AbortHandle};

use super::{Digester, MeasureError, MeasureErrorKind, Process, Stamp, file::measure_open, vm::file_component};

/// A digest on its way. Given up when this value goes.
#[derive(Debug)]
pub struct Program {
    measured: oneshot::Receiver<Result<(Stamp, Component), MeasureError>>,
    task: AbortHandle,
}

impl Drop for Program {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Program {
    /// Begins. Needs a tokio runtime.
    #[must_use]
    pub fn begin(process: &Process, digester: &Digester) -> Self {
        let (tell, measured) = oneshot::channel();
        let role = Role::QemuBinary;
        let of_role = |e| MeasureError::of(role.word(), e);
        let opened = process.program().and_then(|path| Ok((path, process.open_program()?))).map_err(of_role);
        let digester = digester.clone();
        let task = tokio::spawn(async move {
            let measured = async {
                let (path, file) = opened?;
                let fail = |kind: MeasureErrorKind| MeasureError::new(role.word(), &path, kind);
                let stamp = Stamp::from(&file.metadata().map_err(|e| fail(e.into()))?);
                let measured = measure_open(&digester, file, FileDigestAlg::Sha256, false, None).await.map_err(fail)?;
                Ok((stamp, file_component(role, &path, &measured)))
            };
            // Nobody may wait any more.
            let _ = tell.send(measured.await);
        });
        Self { measured, task: task.abort_handle() }
    }

    /// The program that the process runs now: the one that was begun with if there is one and it is that, unchanged.
    ///
    /// # Errors
    /// Why it could not be measured.
    pub(super) async fn measured(
        begun: Option<Self>,
        process: &Process,
        digester: &Digester,
    ) -> Result<Component, MeasureError> {
        let role = Role::QemuBinary.word();
        if let Some(mut begun) = begun
            && let Ok(Ok((stamp, component))) = (&mut begun.measured).await
        {
            let now = process.open_program().and_then(|file| file.metadata());
            if Stamp::from(&now.map_err(|e| MeasureError::of(role, e))?) == stamp {
                return Ok(component);
            }
        }
        let gone = |_| MeasureError::of(role, std::io::Error::other("reading it was given up"));
        let (_, component) = (&mut Self::begin(process, digester).measured).await.map_err(gone)??;
        Ok(component)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    /// A process that runs one program, and another one in its place when it reads a line.
    #[tokio::test]
    async fn the_program_that_counts_is_the_one_that_runs_now() {
        let digester = Digester::default();
        let mut child = Command::new("sh")
            .args(["-c", "read line; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let process = Process::open(child.id()).unwrap();
        // Between fork and exec it runs this test.
        let own = std::env::current_exe().unwrap();
        while process.program().unwrap() == own {
            tokio::task::yield_now().await;
        }
        let shell = process.program().unwrap();
        let first = Program::begin(&process, &digester);
        let second = Program::begin(&process, &digester);
        let component = Program::measured(Some(first), &process, &digester).await.unwrap();
        assert_eq!(component.path, shell.to_str().unwrap());
        std::io::Write::write_all(child.stdin.as_mut().unwrap(), b"\n").unwrap();
        while process.program().unwrap() == shell {
            tokio::task::yield_now().await;
        }
        let component = Program::measured(Some(second), &process, &digester).await.unwrap();
        assert_eq!(component.path, process.program().unwrap().to_str().unwrap());
        assert_ne!(component.path, shell.to_str().unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
