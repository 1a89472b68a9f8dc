//! On stable, and fast: all seeds, and mutations of these that are the same each time.

use std::{
    fs,
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
};

use super::{Check, TARGETS};

/// How many mutations each target gets, divided among its seeds.
const MUTATIONS: usize = 2000;

/// No more than this of a seed: this is a debug build.
const LONGEST: usize = 4096;

/// What parsers look for, and where numbers end.
const WORDS: &[&[u8]] = &[
    b"",
    b":",
    b"/",
    b".",
    b"%",
    b"\"",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b"-",
    b"+",
    b"=",
    b"@",
    b"*",
    b"\n",
    b"\r\n",
    b" ",
    b"\0",
    b"\xff",
    b"\xc3\xbc",
    b"\\u0000",
    b"null",
    b"true",
    b"1e999",
    b"-1",
    b"0",
    b"00",
    b"18446744073709551616",
    b"9223372036854775808",
    b"65536",
    b"\0\0\x06\x04\0\0\0\0\0",
    b"\0\0\x08\x07\0\0\0\0\0",
    b"HTTP/1.1 100 x\n\n",
    b"unix:",
    b"http://",
    b"::1",
    b"active",
    b"id",
];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

/// The seeds of a target, in order.
fn seeds(target: &str) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(folder().join("seeds").join(target));
    let mut seeds: Vec<_> = entries
        .unwrap_or_else(|error| panic!("the seeds of {target}: {error}"))
        .map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            (name, fs::read(entry.path()).unwrap())
        })
        .collect();
    seeds.sort();
    assert!(!seeds.is_empty(), "{target} has no seeds");
    seeds
}

/// What a fuzzer does to an input, once or a few times.
fn mutate(random: &mut fastrand::Rng, bytes: &mut Vec<u8>, other: &[u8]) {
    for _ in 0..=random.usize(0..4) {
        let at = random.usize(0..=bytes.len());
        let end = random.usize(at..=bytes.len().min(at + 16));
        match random.u8(0..7) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.u8(0..8),
            1 if at < bytes.len() => bytes[at] = random.u8(..),
            2 => bytes.insert(at, random.u8(b' '..=b'~')),
            3 => drop(bytes.drain(at..end)),
            4 => {
                let copy = bytes[at..end].to_vec();
                let to = random.usize(0..=bytes.len());
                bytes.splice(to..to, copy);
            }
            5 => {
                let word = WORDS[random.usize(0..WORDS.len())];
                bytes.splice(at..end, word.iter().copied());
            }
            _ => {
                let from = random.usize(0..=other.len());
                let to = random.usize(from..=other.len().min(from + 64));
                bytes.splice(at..end, other[from..to].iter().copied());
            }
        }
    }
}

fn run(target: &str, check: Check, input: &[u8], what: &str) {
    let ended = panic::catch_unwind(AssertUnwindSafe(|| check(input)));
    if let Err(panic) = ended {
        eprintln!("{target} fails with {what}: b\"{}\"", input.escape_ascii());
        panic::resume_unwind(panic);
    }
}

#[test]
fn what_is_checked_holds_for_all_seeds_and_what_is_near_them() {
    // A package has no `fuzz`.
    if !folder().exists() {
        return;
    }
    for (target, check) in TARGETS {
        let seeds = seeds(target);
        let mut random = fastrand::Rng::with_seed(7);
        for (name, seed) in &seeds {
            run(target, *check, seed, name);
            let seed = &seed[..seed.len().min(LONGEST)];
            for _ in 0..MUTATIONS / seeds.len() {
                let mut input = seed.to_vec();
                let (_, other) = &seeds[random.usize(0..seeds.len())];
                mutate(&mut random, &mut input, other);
                run(target, *check, &input, &format!("a mutation of {name}"));
            }
        }
    }
}

#[test]
#[cfg(all(feature = "component", feature = "etcd", feature = "tls"))]
fn all_that_is_checked_is_fuzzed() {
    if !folder().exists() {
        return;
    }
    let names = |folder: &str| {
        let entries = fs::read_dir(self::folder().join(folder)).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| {
                let path = entry.unwrap().path();
                path.file_stem().unwrap().to_str().unwrap().to_owned()
            })
            .collect();
        names.sort();
        names
    };
    let manifest = fs::read_to_string(folder().join("Cargo.toml")).unwrap();
    let targets: Vec<_> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names("seeds"), targets);
    assert_eq!(names("fuzz_targets"), targets);
    for target in targets {
        let path = folder().join(format!("fuzz_targets/{target}.rs"));
        let source = fs::read_to_string(path).unwrap();
        assert!(source.contains(&format!("switchboard::fuzzing::{target}")));
        assert!(manifest.contains(&format!("path = \"fuzz_targets/{target}.rs\"")));
    }
}
