//! Threads that take one token through the network together. Its steps take microseconds, too short to
//! wake threads up for each: here they stay awake from the first to the last, and meet between two.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// Looks at the others' progress before a member goes to sleep: a few hundred microseconds. One that
/// waits for longer waits for a thread that other work keeps from running, and must make room for it.
const PATIENCE: usize = 1 << 14;

/// A fixed number of threads.
pub struct Team {
    pool: ThreadPool,
    /// Held while they work: two tokens at a time would wait for each other.
    busy: Mutex<()>,
}

/// One thread of a team at work.
pub struct Member<'a> {
    round: &'a Round,
    members: usize,
}

/// What the members know of each other.
#[derive(Default)]
struct Round {
    /// The next task of the step.
    next: AtomicUsize,
    /// Members that have no task left.
    waiting: AtomicUsize,
    /// Steps done.
    number: AtomicUsize,
    /// One of them panicked.
    broken: AtomicBool,
    sleepers: AtomicUsize,
    bed: Mutex<()>,
    alarm: Condvar,
}

impl Team {
    /// As many threads as rayon's current pool has.
    pub fn new() -> Self {
        let pool = ThreadPoolBuilder::new()
            .num_threads(rayon::current_num_threads())
            .thread_name(|i| format!("decode-{i}"))
            .build()
            .expect("a machine that runs threads can run some more");
        Self {
            pool,
            busy: Mutex::default(),
        }
    }

    pub fn members(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs `work` on every thread at once.
    pub fn run(&self, work: impl Fn(&Member) + Sync) {
        let _one_at_a_time = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        let round = Round::default();
        let members = self.members();
        self.pool.broadcast(|_| {
            let round = &round;
            work(&Member { round, members });
        });
    }
}

impl Member<'_> {
    pub fn members(&self) -> usize {
        self.members
    }

    /// The members of the team share tasks 0 to `tasks` out among them; returns to each when all are
    /// done. Every member must call it with the same number.
    pub fn share(&self, tasks: usize, mut task: impl FnMut(usize)) {
        loop {
            let next = self.round.next.fetch_add(1, Ordering::Relaxed);
            if next >= tasks {
                break;
            }
            task(next);
        }
        self.wait();
    }

    fn wait(&self) {
        let round = self.round;
        let number = round.number.load(Ordering::Relaxed);
        if round.waiting.fetch_add(1, Ordering::AcqRel) + 1 == self.members {
            // Nobody takes a task before the number changes.
            round.waiting.store(0, Ordering::Relaxed);
            round.next.store(0, Ordering::Relaxed);
            round.number.store(number + 1, Ordering::SeqCst);
            round.wake();
            return;
        }
        let done = || round.number.load(Ordering::SeqCst) != number;
        for _ in 0..PATIENCE {
            if done() {
                return;
            }
            std::hint::spin_loop();
        }
        round.sleep_until(done);
    }
}

impl Round {
    /// Either the sleeper sees that it is `done`, or whoever made it so sees the sleeper: both write
    /// before they read, in one order for all.
    fn sleep_until(&self, done: impl Fn() -> bool) {
        let mut bed = self.bed.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while !done() {
            assert!(
                !self.broken.load(Ordering::SeqCst),
                "another thread panicked"
            );
            let woken = self.alarm.wait(bed);
            bed = woken.unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    fn wake(&self) {
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            let _bed = self.bed.lock().unwrap_or_else(PoisonError::into_inner);
            self.alarm.notify_all();
        }
    }
}

impl Drop for Member<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.round.broken.store(true, Ordering::SeqCst);
            self.round.wake();
        }
    }
}

/// Numbers that every member sees: written in one step, each by one member, and read in a later one.
pub struct Shared(Vec<AtomicU32>);

impl Shared {
    pub fn new(len: usize) -> Self {
        Self((0..len).map(|_| AtomicU32::new(0)).collect())
    }

    pub fn set(&self, at: usize, value: f32) {
        self.0[at].store(value.to_bits(), Ordering::Relaxed);
    }

    pub fn get(&self, at: usize) -> f32 {
        f32::from_bits(self.0[at].load(Ordering::Relaxed))
    }

    /// Copies numbers from `first` on, as many as `target` holds.
    pub fn read(&self, first: usize, target: &mut [f32]) {
        for (value, number) in target.iter_mut().zip(&self.0[first..]) {
            *value = f32::from_bits(number.load(Ordering::Relaxed));
        }
    }

    pub fn write(&self, first: usize, source: &[f32]) {
        for (value, number) in source.iter().zip(&self.0[first..]) {
            number.store(value.to_bits(), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::AssertUnwindSafe;

    use super::*;

    fn team(threads: usize) -> Team {
        let pool = ThreadPoolBuilder::new().num_threads(threads).build();
        pool.unwrap().install(Team::new)
    }

    #[test]
    fn every_task_runs_once_and_after_those_of_the_step_before() {
        // More threads than processors, so that some have to sleep.
        let team = team(5);
        assert_eq!(team.members(), 5);
        let steps: Vec<AtomicUsize> = (0..200).map(|_| AtomicUsize::new(0)).collect();
        for _ in 0..20 {
            team.run(|member| {
                for (i, step) in steps.iter().enumerate() {
                    member.share(i % 9, |_| {
                        if i > 0 {
                            let before = steps[i - 1].load(Ordering::Relaxed);
                            assert_eq!(before % ((i - 1) % 9).max(1), 0);
                        }
                        step.fetch_add(1, Ordering::Relaxed);
                    });
                }
            });
        }
        for (i, step) in steps.iter().enumerate() {
            assert_eq!(step.load(Ordering::Relaxed), 20 * (i % 9), "step {i}");
        }
    }

    #[test]
    fn a_panic_of_one_ends_them_all() {
        let team = team(3);
        let panicked = std::panic::catch_unwind(AssertUnwindSafe(|| {
            team.run(|member| {
                member.share(3, |task| assert_ne!(task, 1, "a bug"));
                member.share(3, |_| ());
            });
        }));
        assert!(panicked.is_err());
        team.run(|member| member.share(2, |_| ()));
    }
}
