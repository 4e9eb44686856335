//! **A fleet**: hosts that are simulated ([`onequote_tests::fleet`]) report to a verifier of its own process. They are
//! enrolled in bulk. A report's time is from the moment in which the host has its evidence to the one in which it is told what
//! the verifier made of it; the simulator, which shares this machine's cores with the verifier, is in it. A report is lost when
//! its connection is, without an answer. At the end every host must be known at the verifier exactly as it is, and every
//! attacker found.

use std::time::Duration;

use anyhow::Result;
use onequote_tests::{
    fleet::{Outcome, Plan, Trial, raise_descriptors},
    lab::Postgres,
};

use crate::numbers::Numbers;

const MIB: f64 = (1 << 20) as f64;

fn plan(hosts: usize, vms: usize) -> Plan {
    Plan { hosts, vms, programs: 1000, attackers: 0, seed: 1 }
}

/// What is promised, or a small part of it, which then says so in its name.
fn promised(short: bool) -> (Trial, String) {
    let (hosts, vms, minutes) = if short { (500, 10, 0.5) } else { (10_000, 100, 5.0) };
    let trial = Trial {
        plan: Plan { attackers: hosts / 16, ..plan(hosts, vms) },
        period: Duration::from_secs(if short { 10 } else { 60 }),
        time: Duration::from_secs_f64(minutes * 60.0),
        every: Duration::from_secs(60),
        push: true,
        database: None,
        replicas: 1,
    };
    (trial, format!("{hosts} hosts x {vms} VMs, {minutes} min{}", if short { " (SHORTENED)" } else { "" }))
}

fn run(trial: &Trial) -> Result<Outcome> {
    raise_descriptors(trial.plan.hosts)?;
    let folder = tempfile::tempdir()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(trial.run(folder.path(), |text| eprintln!("fleet: {text}")))
}

/// Bench 5 with SQLite.
pub(crate) fn sqlite(numbers: &mut Numbers) -> Result<()> {
    let (trial, name) = promised(numbers.short);
    report(numbers, &format!("SQLite, {name}"), &run(&trial)?);
    Ok(())
}

/// Bench 5 with two verifiers on one PostgreSQL.
pub(crate) fn replicas(numbers: &mut Numbers) -> Result<()> {
    let server = Postgres::start()?;
    let (trial, name) = promised(numbers.short);
    let trial = Trial { database: Some(server.database("fleet")?), replicas: 2, ..trial };
    report(numbers, &format!("PostgreSQL, 2 verifiers, {name}"), &run(&trial)?);
    Ok(())
}

fn report(numbers: &mut Numbers, what: &str, outcome: &Outcome) {
    for wrong in &outcome.wrong {
        eprintln!("fleet: WRONG: {wrong}");
    }
    let percent = |seconds: f64| 100.0 * seconds / outcome.seconds.max(0.001);
    numbers.exactly(&format!("reports lost, {what}"), outcome.lost as f64, "reports", 0.0);
    numbers.exactly(&format!("hosts known wrongly, {what}"), outcome.wrong.len() as f64, "hosts", 0.0);
    numbers.below(&format!("report to verdict, p99, {what}"), outcome.steady.p99, "ms", 1000.0);
    numbers.known(&format!("the same, median, {what}"), outcome.steady.median, "ms");
    numbers.known(&format!("reports, {what}"), outcome.taken as f64 / outcome.seconds.max(0.001), "/s");
    numbers.known(&format!("sent away to come later, {what}"), outcome.later as f64, "reports");
    numbers.known(&format!("until all first reports were accepted, {what}"), outcome.first_seconds, "s");
    numbers.known(&format!("verifier's processor, {what}"), percent(outcome.verifier_cpu), "% of a core");
    numbers.known(&format!("simulator's processor, {what}"), percent(outcome.simulator_cpu), "% of a core");
    numbers.known(&format!("verifier's memory, peak, {what}"), outcome.verifier_memory as f64 / MIB, "MiB");
    numbers.known(&format!("simulator's memory, peak, {what}"), outcome.simulator_memory as f64 / MIB, "MiB");
    numbers.known(&format!("attackers, all found, {what}"), outcome.attackers as f64, "hosts");
}

/// Bench 6: bytes of evidence against sending whole lists each time, on hosts with 100 VMs.
pub(crate) fn bytes(numbers: &mut Numbers) -> Result<()> {
    let trial = Trial { time: Duration::from_secs(20), period: Duration::from_secs(5), ..small(16, 100) };
    let outcome = run(&trial)?;
    numbers.known("bytes of a steady report, 100 VMs", outcome.steady_bytes, "bytes");
    numbers.known("bytes of a first report, 100 VMs", outcome.first_bytes, "bytes");
    numbers.known("the whole lists and logs, 100 VMs", outcome.list_bytes, "bytes");
    let share = |bytes: f64| 100.0 * bytes / outcome.list_bytes.max(1.0);
    numbers.below("steady report against whole lists, 100 VMs", share(outcome.steady_bytes), "%", 10.0);
    numbers.below("first report against whole lists, 100 VMs", share(outcome.first_bytes), "%", 50.0);
    Ok(())
}

fn small(hosts: usize, vms: usize) -> Trial {
    Trial {
        plan: plan(hosts, vms),
        period: Duration::from_secs(10),
        time: Duration::from_secs(30),
        every: Duration::from_secs(30),
        push: true,
        database: None,
        replicas: 1,
    }
}

/// Bench 9: how the cost grows with hosts, and with VMs on each.
pub(crate) fn growth(numbers: &mut Numbers) -> Result<()> {
    let (hosts, vms): (&[usize], &[usize]) = match numbers.short {
        true => (&[10, 100], &[1, 10, 100]),
        false => (&[100, 1000, 10_000], &[1, 10, 100, 1000]),
    };
    let mut rows = Vec::new();
    // The fewer reports there are, the longer it takes to count what one costs; the more, the longer the period.
    let sizes = hosts.iter().map(|&hosts| (hosts, 10)).chain(vms.iter().map(|&vms| (hosts[0], vms)));
    for (hosts, vms) in sizes {
        if rows.iter().any(|row: &Outcome| (row.hosts, row.vms) == (hosts, vms)) {
            continue;
        }
        let period = Duration::from_secs(if hosts * vms > 20_000 { 60 } else { 10 });
        let trial = Trial { period, time: period * 3, every: period * 3, ..small(hosts, vms) };
        rows.push(run(&trial)?);
    }
    let short = if numbers.short { " (SHORTENED)" } else { "" };
    for row in &rows {
        let what = format!("{} hosts x {} VMs{short}", row.hosts, row.vms);
        numbers.known(&format!("verifier's processor a report, {what}"), each(row), "ms");
        numbers.known(&format!("verifier's memory, {what}"), row.verifier_memory as f64 / MIB, "MiB");
        numbers.known(&format!("report to verdict, p99, {what}"), row.steady.p99, "ms");
        numbers.exactly(&format!("lost or wrong, {what}"), (row.lost as usize + row.wrong.len()) as f64, "", 0.0);
    }
    if let Some(folder) = &numbers.docs {
        std::fs::write(folder.join("growth.md"), page(&rows, short))?;
        std::fs::write(folder.join("growth.svg"), plot::draw(&rows, hosts[0]))?;
    }
    Ok(())
}

/// Milliseconds of the verifier's processor for a report.
fn each(row: &Outcome) -> f64 {
    1000.0 * row.verifier_cpu / (row.taken.max(1) as f64)
}

fn page(rows: &[Outcome], short: &str) -> String {
    let mut out = format!(
        "# How the cost grows{short}\n\nMade by `cargo xtask bench --only growth --docs docs`, verifier and simulated hosts on one machine with {} \
         cores. What a report costs is the verifier's processor time for everything in that time, by the reports in it; p99 is from the host's \
         having its evidence to its being told what came of it, with the simulator on the same cores.\n\n![The plot](growth.svg)\n\n\
         | hosts | VMs on each | first report, ms | report, ms | p99, ms | verifier, MiB | database, MiB | report, bytes | first report, bytes |\n\
         | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
        std::thread::available_parallelism().map_or(0, std::num::NonZero::get)
    );
    for row in rows {
        out += &format!(
            "| {} | {} | {:.2} | {:.2} | {:.1} | {:.0} | {:.0} | {:.0} | {:.0} |\n",
            row.hosts,
            row.vms,
            1000.0 * row.first_cpu / row.hosts.max(1) as f64,
            each(row),
            row.steady.p99,
            row.verifier_memory as f64 / MIB,
            row.database_bytes as f64 / MIB,
            row.steady_bytes,
            row.first_bytes
        );
    }
    out
}

/// Two plots beside each other, both axes logarithmic.
mod plot {
    use std::fmt::Write as _;

    use onequote_tests::fleet::Outcome;

    use super::{MIB, each};

    const WIDTH: f64 = 360.0;
    const HEIGHT: f64 = 260.0;
    const MARGIN: f64 = 56.0;
    const COLOURS: [&str; 2] = ["#1b6ca8", "#b5541c"];

    pub(super) fn draw(rows: &[Outcome], fewest: usize) -> String {
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" font-family=\"sans-serif\" font-size=\"11\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
            2.0 * (WIDTH + MARGIN) + MARGIN,
            HEIGHT + 2.0 * MARGIN
        );
        let by_hosts: Vec<&Outcome> = rows.iter().filter(|row| row.vms == 10).collect();
        let by_vms: Vec<&Outcome> = rows.iter().filter(|row| row.hosts == fewest).collect();
        panel(&mut out, MARGIN, "hosts, with 10 VMs each", &by_hosts, |row| row.hosts as f64);
        panel(&mut out, 2.0 * MARGIN + WIDTH, &format!("VMs on each of {fewest} hosts"), &by_vms, |row| row.vms as f64);
        out += "</svg>\n";
        out
    }

    fn panel(out: &mut String, left: f64, title: &str, rows: &[&Outcome], x: impl Fn(&Outcome) -> f64) {
        type Value = fn(&Outcome) -> f64;
        let lines: [(&str, Value); 2] = [
            ("processor of the verifier a report, ms", each),
            ("memory of the verifier, MiB", |row| row.verifier_memory as f64 / MIB),
        ];
        let log = |value: f64| value.max(1e-3).log10();
        let xs: Vec<f64> = rows.iter().map(|row| log(x(row))).collect();
        let ys = || lines.iter().flat_map(|(_, y)| rows.iter().map(|row| log(y(row))));
        let (x0, x1) = span(xs.iter().copied());
        let (y0, y1) = span(ys());
        let at =
            |x: f64, y: f64| (left + (x - x0) / (x1 - x0) * WIDTH, MARGIN + HEIGHT - (y - y0) / (y1 - y0) * HEIGHT);
        let _ = writeln!(
            out,
            "<rect x=\"{left}\" y=\"{MARGIN}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"none\" stroke=\"#999\"/>\n\
             <text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{title}</text>",
            left + WIDTH / 2.0,
            MARGIN + HEIGHT + 34.0
        );
        for power in x0 as i32..=x1 as i32 {
            let (x, _) = at(f64::from(power), y0);
            let _ = writeln!(
                out,
                "<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                MARGIN + HEIGHT + 16.0,
                tick(power)
            );
        }
        for power in y0 as i32..=y1 as i32 {
            let (_, y) = at(x0, f64::from(power));
            let _ = writeln!(
                out,
                "<line x1=\"{left}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                left + WIDTH,
                left - 6.0,
                y + 4.0,
                tick(power)
            );
        }
        for (number, ((name, y), colour)) in lines.iter().zip(COLOURS).enumerate() {
            let points: Vec<(f64, f64)> = rows.iter().zip(&xs).map(|(row, &x)| at(x, log(y(row)))).collect();
            let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            let _ = writeln!(
                out,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
                path.join(" ")
            );
            for (x, y) in points {
                let _ = writeln!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>");
            }
            let _ = writeln!(
                out,
                "<text x=\"{:.1}\" y=\"{:.1}\" fill=\"{colour}\">{name}</text>",
                left + 8.0,
                MARGIN - 20.0 + 14.0 * number as f64
            );
        }
    }

    /// Whole powers of ten around all values.
    fn span(values: impl Iterator<Item = f64>) -> (f64, f64) {
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
        let low = if low.is_finite() { low.floor() } else { 0.0 };
        (low, if high.is_finite() { high.ceil().max(low + 1.0) } else { low + 1.0 })
    }

    fn tick(power: i32) -> String {
        match power {
            0.. => format!("{}", 10_u64.pow(power.unsigned_abs().min(18))),
            _ => format!("{}", 10_f64.powi(power)),
        }
    }
}
