//! Progress bars on a terminal, plain lines elsewhere; always on stderr.

use std::io::IsTerminal;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use trommel_core::progress::Progress;

/// The progress that fits where stderr goes.
pub(crate) fn for_stderr() -> Arc<dyn Progress> {
    if std::io::stderr().is_terminal() { Arc::new(Bars::default()) } else { Arc::new(Lines::default()) }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A bar that redraws in place.
#[derive(Default)]
struct Bars(Mutex<Option<ProgressBar>>);

const KNOWN: &str = "{prefix:<24} {wide_bar} {percent:>3}%  {elapsed} of {duration}  {msg}";
const UNKNOWN: &str = "{prefix:<24} {spinner} {elapsed}  {msg}";

impl Progress for Bars {
    fn begin(&self, name: &str, total: Option<u64>, _: &str) {
        let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template(if total.is_some() { KNOWN } else { UNKNOWN });
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_prefix(name.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        *locked(&self.0) = Some(bar);
    }

    fn advance(&self, n: u64) {
        locked(&self.0).iter().for_each(|bar| bar.inc(n));
    }

    fn note(&self, text: &str) {
        locked(&self.0).iter().for_each(|bar| bar.set_message(text.to_owned()));
    }

    fn end(&self) {
        if let Some(bar) = locked(&self.0).take() {
            bar.finish_and_clear();
            eprintln!("{:<24} done in {}", bar.prefix(), HumanDuration(bar.elapsed()));
        }
    }

    fn line(&self, text: &str) {
        match &*locked(&self.0) {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }
}

/// A line when a step begins and ends, and every few seconds in between.
#[derive(Default)]
struct Lines(Mutex<Option<Step>>);

struct Step {
    name: String,
    unit: String,
    total: Option<u64>,
    done: u64,
    note: String,
    began: Instant,
    said: Instant,
}

const INTERVAL: Duration = Duration::from_secs(10);

impl Lines {
    fn say(&self, step: &mut Step) {
        step.said = Instant::now();
        let share =
            step.total.filter(|&t| t > 0).map(|t| format!("{:.0}% of {t} {}", step.done as f64 / t as f64 * 100.0, step.unit));
        let amount = share.unwrap_or_else(|| format!("{} {}", step.done, step.unit));
        eprintln!("{}: {amount} after {:.0} s  {}", step.name, step.began.elapsed().as_secs_f64(), step.note);
    }
}

impl Progress for Lines {
    fn begin(&self, name: &str, total: Option<u64>, unit: &str) {
        let (now, name, unit) = (Instant::now(), name.to_owned(), unit.to_owned());
        eprintln!("{name}: started");
        *locked(&self.0) = Some(Step { name, unit, total, done: 0, note: String::new(), began: now, said: now });
    }

    fn advance(&self, n: u64) {
        if let Some(step) = &mut *locked(&self.0) {
            step.done += n;
            if step.said.elapsed() > INTERVAL {
                self.say(step);
            }
        }
    }

    fn note(&self, text: &str) {
        locked(&self.0).iter_mut().for_each(|step| step.note = text.to_owned());
    }

    fn end(&self) {
        if let Some(step) = locked(&self.0).take() {
            eprintln!("{}: done in {:.1} s  {}", step.name, step.began.elapsed().as_secs_f64(), step.note);
        }
    }

    fn line(&self, text: &str) {
        eprintln!("{text}");
    }
}
