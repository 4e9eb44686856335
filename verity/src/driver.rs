//! Work in parallel whose results are taken in order, with a bound on how far one thread may run ahead of another.

use std::{
    collections::BTreeMap,
    num::NonZeroUsize,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

use crate::VerityError;

/// Results that wait for an earlier one, at most.
const WINDOW: u64 = 256;

type Outcome<T> = Result<T, VerityError>;

/// What comes next.
pub(crate) enum Step<W, R> {
    /// Work that gives a result.
    Work(W),
    /// A result that needs no work.
    Ready(R),
}

/// Runs `work` on each step that `next` gives, on so many threads, this one among them; each has a `scratch` of its own.
/// Results are taken by `accept` in the order of the steps. The first error ends all.
pub(crate) fn in_order<W, R: Send, S>(
    threads: NonZeroUsize,
    next: impl FnMut() -> Outcome<Option<Step<W, R>>> + Send,
    scratch: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, W) -> Outcome<R> + Sync,
    accept: impl FnMut(R) -> Outcome<()> + Send,
) -> Outcome<()> {
    let state = State { next, accept, given: 0, due: 0, waiting: BTreeMap::new(), end: None };
    let line = Line { state: Mutex::new(state), room: Condvar::new() };
    let thread = || {
        let _guard = EndOnPanic(&line);
        let mut scratch = scratch();
        while let Some((number, step)) = line.take() {
            let result = work(&mut scratch, step);
            line.give(number, result);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.get() {
            // Without it there is one fewer.
            let _ = std::thread::Builder::new().name("measure".to_owned()).spawn_scoped(scope, thread);
        }
        thread();
    });
    line.state.into_inner().unwrap_or_else(PoisonError::into_inner).end.unwrap_or(Ok(()))
}

struct Line<N, A, R> {
    state: Mutex<State<N, A, R>>,
    /// Told whenever a result was taken or an error was met.
    room: Condvar,
}

struct State<N, A, R> {
    next: N,
    accept: A,
    /// Number of the next step to be given out.
    given: u64,
    /// Number of the next result to be taken.
    due: u64,
    waiting: BTreeMap<u64, R>,
    end: Option<Outcome<()>>,
}

impl<N, A, R> Line<N, A, R> {
    fn lock(&self) -> MutexGuard<'_, State<N, A, R>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next work and its number; nothing when there is none left or an error was met.
    fn take<W>(&self) -> Option<(u64, W)>
    where
        N: FnMut() -> Outcome<Option<Step<W, R>>>,
        A: FnMut(R) -> Outcome<()>,
    {
        let mut state = self.lock();
        while state.end.is_none() {
            if state.given - state.due >= WINDOW {
                state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            match (state.next)() {
                Ok(Some(step)) => {
                    let number = state.given;
                    state.given += 1;
                    match step {
                        Step::Work(work) => return Some((number, work)),
                        Step::Ready(result) => state.deliver(number, result),
                    }
                }
                Ok(None) => return None,
                Err(e) => state.fail(e),
            }
        }
        drop(state);
        self.room.notify_all();
        None
    }

    fn give(&self, number: u64, result: Outcome<R>)
    where
        A: FnMut(R) -> Outcome<()>,
    {
        let mut state = self.lock();
        match result {
            Ok(result) => state.deliver(number, result),
            Err(e) => state.fail(e),
        }
        drop(state);
        self.room.notify_all();
    }
}

impl<N, A, R> State<N, A, R> {
    /// Takes a result, and those that waited for it.
    fn deliver(&mut self, number: u64, result: R)
    where
        A: FnMut(R) -> Outcome<()>,
    {
        self.waiting.insert(number, result);
        while let Some(result) = self.waiting.remove(&self.due) {
            self.due += 1;
            if let Err(e) = (self.accept)(result) {
                return self.fail(e);
            }
        }
    }

    fn fail(&mut self, error: VerityError) {
        self.end.get_or_insert(Err(error));
    }
}

/// A thread that panics gives nothing: the others must not wait for it.
struct EndOnPanic<'a, N, A, R>(&'a Line<N, A, R>);

impl<N, A, R> Drop for EndOnPanic<'_, N, A, R> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().fail(VerityError::Stopped);
            self.0.room.notify_all();
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use std::{
        sync::atomic::{AtomicU64, Ordering},
        time::Duration,
    };

    use super::*;

    const THREADS: NonZeroUsize = NonZeroUsize::new(4).unwrap();

    fn count_to(end: u64) -> impl FnMut() -> Outcome<Option<Step<u64, u64>>> + Send {
        let mut n = 0;
        move || {
            n += 1;
            Ok((n <= end).then_some(if n % 7 == 0 { Step::Ready(n) } else { Step::Work(n) }))
        }
    }

    #[test]
    fn results_come_in_order() {
        let mut all = Vec::new();
        let accept = |n| {
            all.push(n);
            Ok(())
        };
        in_order(THREADS, count_to(5000), || (), |(), n| Ok(n), accept).unwrap();
        assert_eq!(all, (1..=5000).collect::<Vec<_>>());
    }

    #[test]
    fn nobody_runs_far_ahead_of_a_slow_one() {
        let (done, most) = (AtomicU64::new(0), AtomicU64::new(0));
        let work = |(): &mut (), n| {
            if n == 1 {
                // Until the others can go no further, at most so long: they must not be stopped by anything but this.
                for _ in 0..2000 {
                    let before = done.load(Ordering::SeqCst);
                    std::thread::sleep(Duration::from_millis(2));
                    if before > WINDOW / 2 && done.load(Ordering::SeqCst) == before {
                        break;
                    }
                }
                most.store(done.load(Ordering::SeqCst), Ordering::SeqCst);
            } else {
                done.fetch_add(1, Ordering::SeqCst);
            }
            Ok(n)
        };
        in_order(THREADS, count_to(5000), || (), work, |_| Ok(())).unwrap();
        assert!(most.load(Ordering::SeqCst) < WINDOW);
    }

    #[test]
    fn the_first_error_ends_all() {
        let work = |(): &mut (), n| if n == 1000 { Err(VerityError::Shrunk) } else { Ok(n) };
        let e = in_order(THREADS, count_to(u64::MAX), || (), work, |_| Ok(())).unwrap_err();
        assert!(matches!(e, VerityError::Shrunk));
        let accept = |n| if n == 1000 { Err(VerityError::Stopped) } else { Ok(()) };
        let e = in_order(THREADS, count_to(u64::MAX), || (), |(), n| Ok(n), accept).unwrap_err();
        assert!(matches!(e, VerityError::Stopped));
    }

    #[test]
    fn a_panic_is_passed_on_and_nobody_waits() {
        let work = |(): &mut (), n| if n == 10 { panic!("in work") } else { Ok(n) };
        let run = || in_order(THREADS, count_to(u64::MAX), || (), work, |_| Ok(()));
        assert!(std::panic::catch_unwind(run).is_err());
    }
}
