//! Token files, data sets, sampling and loading, through the public API. The files are written
//! byte by byte here, as llm.c and nanoGPT write them, so the reader is not tested against our
//! own writer alone.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use tempfile::TempDir;
use titanbit::data::sampler::{MIXTURE_BLOCK, permute};
use titanbit::data::{Loader, Mixture, Sidecar, TokenDtype, TokenFile, TokenSet, TokenWriter};

const VOCAB: u32 = 1000;

/// An llm.c file: 256 int32 of header, then the tokens.
fn llmc(magic: i32, version: i32, count: i32, tokens: &[u8]) -> Vec<u8> {
    let mut header = [0i32; 256];
    header[..3].copy_from_slice(&[magic, version, count]);
    let mut bytes: Vec<u8> = header
        .iter()
        .flat_map(|field| field.to_le_bytes())
        .collect();
    bytes.extend(tokens);
    bytes
}

fn u16s(tokens: impl IntoIterator<Item = u16>) -> Vec<u8> {
    tokens.into_iter().flat_map(u16::to_le_bytes).collect()
}

fn write(dir: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join(name);
    fs::write(&path, bytes).unwrap();
    path
}

/// A GPT-2 style file holding `tokens`.
fn gpt2(dir: &TempDir, name: &str, tokens: impl IntoIterator<Item = u16>) -> PathBuf {
    let tokens = u16s(tokens);
    let bytes = llmc(20240520, 1, tokens.len() as i32 / 2, &tokens);
    write(dir, name, &bytes)
}

fn open(path: &Path) -> TokenSet {
    TokenSet::open(&[path], None).unwrap()
}

fn all_tokens(file: &TokenFile) -> Vec<u32> {
    let mut ids = Vec::new();
    file.read(0..file.len(), &mut ids);
    ids
}

fn open_error(path: &Path, dtype: Option<TokenDtype>) -> String {
    TokenFile::open(path, dtype).unwrap_err().to_string()
}

#[test]
fn files_of_llmc_and_nanogpt_load() {
    let dir = TempDir::new().unwrap();
    let small = gpt2(&dir, "gpt2.bin", [50256, 7, 0, 65535]);
    let file = TokenFile::open(&small, None).unwrap();
    assert_eq!(all_tokens(&file), [50256, 7, 0, 65535]);
    assert_eq!(file.dtype(), TokenDtype::U16);
    assert!(file.sidecar().is_none());
    assert!(!file.verify_checksum().unwrap(), "nothing to compare with");
    assert_eq!(file.max_id(), Some((65535, 3)));

    let wide: Vec<u8> = [128000u32, 5, u32::MAX].map(u32::to_le_bytes).concat();
    let llama = write(&dir, "llama3.bin", &llmc(20240801, 7, 3, &wide));
    let file = TokenFile::open(&llama, None).unwrap();
    assert_eq!(all_tokens(&file), [128000, 5, u32::MAX]);

    let nanogpt = write(&dir, "nanogpt.bin", &u16s([1, 2, 50256]));
    let file = TokenFile::open(&nanogpt, Some(TokenDtype::U16)).unwrap();
    assert_eq!(all_tokens(&file), [1, 2, 50256]);
    let raw32 = write(&dir, "raw32.bin", &wide);
    let file = TokenFile::open(&raw32, Some(TokenDtype::U32)).unwrap();
    assert_eq!(all_tokens(&file), [128000, 5, u32::MAX]);
}

#[test]
fn damaged_files_are_refused_with_expected_and_found() {
    let dir = TempDir::new().unwrap();
    let error = |name: &str, bytes: &[u8], dtype| open_error(&write(&dir, name, bytes), dtype);

    let cut = error("cut.bin", &llmc(20240520, 1, 5, &u16s([1, 2, 3])), None);
    assert!(cut.contains("cut.bin: cut short"), "{cut}");
    assert!(
        cut.contains("5 tokens") && cut.contains("1034") && cut.contains("1030"),
        "{cut}"
    );

    let long = error("long.bin", &llmc(20240520, 1, 2, &u16s([1, 2, 3])), None);
    assert!(long.contains("too long"), "{long}");

    let header = error("header.bin", &llmc(20240520, 1, 0, &[])[..100], None);
    assert!(header.contains("100 bytes of 1024"), "{header}");

    let empty = error("empty.bin", &[], None);
    assert!(empty.contains("empty.bin: the file is empty"), "{empty}");

    let magic = error("magic.bin", &llmc(12345, 1, 1, &u16s([1])), None);
    assert!(
        magic.contains("magic number 12345") && magic.contains("dtype"),
        "{magic}"
    );

    let version = error("version.bin", &llmc(20240520, 2, 1, &u16s([1])), None);
    assert!(version.contains("version 2; version 1"), "{version}");

    let negative = error("negative.bin", &llmc(20240520, 1, -4, &u16s([1])), None);
    assert!(negative.contains("-4 tokens"), "{negative}");

    let odd = error("odd.bin", &[1, 2, 3], Some(TokenDtype::U16));
    assert!(
        odd.contains("3 bytes is not a whole number of tokens"),
        "{odd}"
    );

    let directory = open_error(dir.path(), None);
    assert!(directory.contains("directory"), "{directory}");
    let missing = open_error(&dir.path().join("missing.bin"), None);
    assert!(
        missing.contains("cannot open") && missing.contains("missing.bin"),
        "{missing}"
    );
}

/// Writes a file and its sidecar with our writer.
fn publish(path: &Path, ids: &[u32], vocab_size: u32) -> Sidecar {
    let mut writer = TokenWriter::create(path.with_extension("tmp"), vocab_size).unwrap();
    for part in ids.chunks(3) {
        writer.write(part).unwrap();
    }
    assert!(!path.exists(), "not visible before it is complete");
    let finished = writer.finish().unwrap();
    let sidecar = Sidecar {
        tokenizer: "tokenizer.json".into(),
        tokenizer_hash: "0".into(),
        vocab_size,
        eos_id: 0,
        tokens: finished.tokens(),
        documents: 1,
        source_bytes: 9,
        checksum: finished.checksum().to_string(),
        command: "test".into(),
    };
    finished.publish(path, &sidecar).unwrap();
    sidecar
}

#[test]
fn a_written_file_is_an_llmc_file_with_a_sidecar() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("train.bin");
    let sidecar = publish(&path, &[3, 1, 4, 1, 5, 9, 2, 6], 10);
    let expected = llmc(20240520, 1, 8, &u16s([3, 1, 4, 1, 5, 9, 2, 6]));
    assert_eq!(fs::read(&path).unwrap(), expected);
    let file = TokenFile::open(&path, None).unwrap();
    assert_eq!(file.sidecar(), Some(&sidecar));
    assert!(file.verify_checksum().unwrap());

    let wide = dir.path().join("wide.bin");
    publish(&wide, &[70_000, 2], 70_001);
    let expected = [70_000u32, 2].map(u32::to_le_bytes).concat();
    assert_eq!(fs::read(&wide).unwrap(), llmc(20240801, 7, 2, &expected));
    let names: HashSet<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let expected = ["train.bin", "train.json", "wide.bin", "wide.json"];
    assert_eq!(
        names,
        expected.map(String::from).into(),
        "no temporary file left"
    );
}

#[test]
fn the_writer_refuses_ids_outside_the_vocabulary_and_leaves_nothing() {
    let dir = TempDir::new().unwrap();
    let mut writer = TokenWriter::create(dir.path().join("x.tmp"), 10).unwrap();
    let error = writer.write(&[9, 10]).unwrap_err().to_string();
    assert!(
        error.contains("id 10") && error.contains("vocabulary of 10"),
        "{error}"
    );
    drop(writer);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_sidecar_that_disagrees_is_an_error() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("train.bin");
    publish(&path, &[1, 2, 3, 4], 10);

    fs::write(&path, llmc(20240520, 1, 4, &u16s([1, 2, 3, 5]))).unwrap();
    let file = TokenFile::open(&path, None).unwrap();
    let error = file.verify_checksum().unwrap_err().to_string();
    assert!(
        error.contains("checksum") && error.contains("train.bin"),
        "{error}"
    );

    fs::write(&path, llmc(20240520, 1, 3, &u16s([1, 2, 3]))).unwrap();
    let error = open_error(&path, None);
    assert!(
        error.contains("holds 3 tokens") && error.contains("says 4"),
        "{error}"
    );

    fs::write(path.with_extension("json"), "{\"name\": 1}").unwrap();
    let error = open_error(&path, None);
    assert!(error.contains("train.json: not the sidecar of"), "{error}");
}

#[test]
fn windows_overlap_by_one_token_and_never_cross_a_shard() {
    let dir = TempDir::new().unwrap();
    gpt2(&dir, "d_000.bin", 0..9);
    gpt2(&dir, "d_001.bin", 100..108);
    let set = open(&dir.path().join("d.bin"));
    assert_eq!(set.tokens(), 17);
    assert_eq!(set.windows(4).unwrap(), 3);
    let batches: Vec<_> = set
        .sequential_batches(4, 2, 10, VOCAB)
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert_eq!(batches[0].inputs, [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(batches[0].targets, [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!((batches[1].rows, batches[1].first), (1, 2));
    assert_eq!(batches[1].inputs, [100, 101, 102, 103]);
    assert_eq!(batches[1].targets, [101, 102, 103, 104]);
    assert_eq!(batches.len(), 2);
    assert_eq!(set.sequential_batches(4, 1, 2, VOCAB).unwrap().count(), 2);

    // The directory and the explicit list are the same set.
    let listed = [dir.path().join("d_000.bin"), dir.path().join("d_001.bin")];
    for set in [open(dir.path()), TokenSet::open(&listed, None).unwrap()] {
        assert_eq!(set.batch(0..3, 0, 4, VOCAB).unwrap().inputs.len(), 12);
        assert_eq!(
            set.batch(2..3, 0, 4, VOCAB).unwrap().inputs,
            [100, 101, 102, 103]
        );
    }
}

#[test]
fn shards_past_a_thousand_stay_in_order_and_other_files_stay_out() {
    let dir = TempDir::new().unwrap();
    for (shard, token) in [(1000, 3), (2, 1), (999, 2)] {
        gpt2(&dir, &format!("d_{shard:03}.bin"), [token, token]);
    }
    gpt2(&dir, "d_val.bin", [9, 9]);
    let set = open(&dir.path().join("d.bin"));
    assert_eq!(set.batch(0..3, 0, 1, VOCAB).unwrap().inputs, [1, 2, 3]);
    assert_eq!(set.shards().len(), 3);
}

#[test]
fn sets_that_cannot_be_used_say_why() {
    let dir = TempDir::new().unwrap();
    let path = gpt2(&dir, "short.bin", 0..10);
    let error = open(&path).windows(10).unwrap_err().to_string();
    assert!(
        error.contains("sequence length of 10") && error.contains("only 10"),
        "{error}"
    );
    assert_eq!(open(&path).windows(9).unwrap(), 1);

    let missing = TokenSet::open(&[dir.path().join("no.bin")], None).unwrap_err();
    assert!(missing.to_string().contains("no token file"), "{missing}");
    let empty = TempDir::new().unwrap();
    let error = TokenSet::open(&[empty.path()], None).unwrap_err();
    assert!(error.to_string().contains("no .bin files in"), "{error}");

    let vocabulary = dir.path().join("vocab.bin");
    publish(&vocabulary, &[1, 2, 3], 5000);
    let error = Mixture::new(vec![(open(&vocabulary), 1.0)], 2, 4096, 0)
        .err()
        .unwrap();
    assert!(
        error.to_string().contains("5000") && error.to_string().contains("4096"),
        "{error}"
    );
    assert_eq!(error.exit_code(), 2);

    let other = dir.path().join("other.bin");
    let mut sidecar = publish(&other, &[1, 2, 3], 5000);
    sidecar.tokenizer_hash = "1".into();
    fs::write(
        other.with_extension("json"),
        serde_json::to_vec(&sidecar).unwrap(),
    )
    .unwrap();
    let error = TokenSet::open(&[&vocabulary, &other], None).unwrap_err();
    assert!(
        error.to_string().contains("different tokenizers (0 and 1)"),
        "{error}"
    );
    let both = vec![(open(&vocabulary), 1.0), (open(&other), 1.0)];
    let error = Mixture::new(both, 2, 5000, 0).err().unwrap();
    assert!(
        error.to_string().contains("different tokenizers"),
        "{error}"
    );

    for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(
            Mixture::new(vec![(open(&path), weight)], 4, VOCAB, 0).is_err(),
            "{weight}"
        );
    }
    let tiny = vec![(open(&path), 1.0), (open(&path), 1e-6)];
    let error = Mixture::new(tiny, 4, VOCAB, 0).err().unwrap().to_string();
    assert!(error.contains("less than 1 in 10000"), "{error}");
}

#[test]
fn an_id_outside_the_vocabulary_names_file_and_position() {
    let dir = TempDir::new().unwrap();
    let path = gpt2(
        &dir,
        "bad.bin",
        (0..40).map(|i| if i == 17 { 999 } else { i }),
    );
    let mixture = Mixture::new(vec![(open(&path), 1.0)], 4, 500, 3).unwrap();
    let mut loader = Loader::new(Arc::new(mixture), 0, 9).unwrap();
    let error = loader.next().unwrap_err().to_string();
    assert!(error.contains("bad.bin: token 17 is id 999"), "{error}");
    assert_eq!(loader.position(), 0);

    // As the last target of a window it is found too.
    let path = gpt2(&dir, "last.bin", [1, 2, 3, 4, 999]);
    let error = open(&path).batch(0..1, 0, 4, 500).unwrap_err().to_string();
    assert!(error.contains("token 4 is id 999"), "{error}");
}

proptest! {
    #[test]
    fn permute_is_a_bijection(n in 1u64..3000, key in any::<u64>()) {
        let image: HashSet<u64> = (0..n).map(|i| permute(i, n, key)).collect();
        prop_assert_eq!(image.len() as u64, n);
        prop_assert!(image.iter().all(|&i| i < n));
    }
}

#[test]
fn permute_looks_random() {
    // Over many keys, each of 7 items lands in each of 7 places about equally often:
    // chi-squared with 36 degrees of freedom is below 80 but once in 10^4.
    let mut counts = [[0u32; 7]; 7];
    for key in 0..7000 {
        for item in 0..7 {
            counts[item as usize][permute(item, 7, key) as usize] += 1;
        }
    }
    let chi2: f64 = counts
        .iter()
        .flatten()
        .map(|&count| (f64::from(count) - 1000.0).powi(2) / 1000.0)
        .sum();
    assert!(chi2 < 80.0, "{chi2}");
    // Neighbours do not stay neighbours.
    let n = 100_000;
    let adjacent = (0..n - 1)
        .filter(|&i| permute(i, n, 5).abs_diff(permute(i + 1, n, 5)) == 1)
        .count();
    assert!(adjacent < 20, "{adjacent}");
}

#[test]
fn each_epoch_visits_each_window_once_in_a_new_order() {
    let dir = TempDir::new().unwrap();
    let path = gpt2(&dir, "a.bin", (0..4001).map(|i| i % 500));
    let mixture = |seed| Mixture::new(vec![(open(&path), 1.0)], 4, VOCAB, seed).unwrap();
    let order = |seed, epoch: u64| -> Vec<u64> {
        let mixture = mixture(seed);
        (epoch * 1000..(epoch + 1) * 1000)
            .map(|index| {
                let window = mixture.window(index);
                assert_eq!(window.epoch, epoch);
                window.window
            })
            .collect()
    };
    for epoch in [0, 1, 12] {
        let mut sorted = order(7, epoch);
        sorted.sort();
        assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
    }
    assert_ne!(order(7, 0), order(7, 1));
    assert_ne!(order(7, 0), order(8, 0));
    assert_eq!(order(7, 1), order(7, 1), "the same after opening again");
}

#[test]
fn mixture_shares_are_exact_and_every_set_keeps_its_epochs() {
    let dir = TempDir::new().unwrap();
    let sizes = [30u64, 500, 77];
    let sets = |weights: [f64; 3]| {
        let sets = sizes
            .iter()
            .zip(weights)
            .enumerate()
            .map(|(i, (&windows, weight))| {
                let tokens = (0..windows * 2 + 1).map(|_| i as u16);
                (open(&gpt2(&dir, &format!("{i}.bin"), tokens)), weight)
            })
            .collect();
        Mixture::new(sets, 2, VOCAB, 11).unwrap()
    };
    let mixture = sets([0.2, 0.5, 0.3]);
    for block in 0..3 {
        let mut counts = [0; 3];
        for index in block * MIXTURE_BLOCK..(block + 1) * MIXTURE_BLOCK {
            counts[mixture.window(index).set] += 1;
        }
        assert_eq!(counts, [2000, 5000, 3000]);
    }
    // Thirds do not divide the block: the shares differ by one sample at most.
    let thirds = sets([1.0, 1.0, 1.0]);
    let mut counts = [0; 3];
    (0..MIXTURE_BLOCK).for_each(|index| counts[thirds.window(index).set] += 1);
    counts.sort();
    assert_eq!(counts, [3333, 3333, 3334]);
    // Sets are interleaved, not one after the other.
    let first: HashSet<_> = (0..50).map(|i| mixture.window(i).set).collect();
    assert_eq!(first.len(), 3);
    // Within complete epochs of each set, each window comes once.
    let mut seen: HashMap<(usize, u64), HashSet<u64>> = HashMap::new();
    for index in 0..2 * MIXTURE_BLOCK {
        let at = mixture.window(index);
        let fresh = seen
            .entry((at.set, at.epoch))
            .or_default()
            .insert(at.window);
        assert!(fresh, "{at:?} came twice");
    }
    for (set, &windows) in sizes.iter().enumerate() {
        let full = [4000, 10_000, 6000][set] / windows;
        for epoch in 0..full {
            assert_eq!(
                seen[&(set, epoch)].len() as u64,
                windows,
                "set {set} epoch {epoch}"
            );
        }
    }
}

#[test]
fn the_loader_resumes_by_position_alone() {
    let dir = TempDir::new().unwrap();
    let a = gpt2(&dir, "a.bin", 0..321);
    let b = gpt2(&dir, "b.bin", 400..803);
    let mixture = || {
        let sets = vec![(open(&a), 3.0), (open(&b), 1.0)];
        Arc::new(Mixture::new(sets, 8, VOCAB, 42).unwrap())
    };
    let mut loader = Loader::new(mixture(), 0, 4).unwrap();
    let batches: Vec<_> = (0..60).map(|_| loader.next().unwrap()).collect();
    for (i, batch) in batches.iter().enumerate() {
        assert_eq!(batch.first, 4 * i as u64);
        assert_eq!((batch.rows, batch.seq_len, batch.inputs.len()), (4, 8, 32));
        for (inputs, targets) in batch.inputs.chunks(8).zip(batch.targets.chunks(8)) {
            assert_eq!(inputs[1..], targets[..7]);
            assert_eq!(targets[7], inputs[7] + 1, "these files count upwards");
        }
    }
    assert_eq!(loader.position(), 240);
    let mut resumed = Loader::new(mixture(), 100, 4).unwrap();
    assert_eq!(resumed.next().unwrap(), batches[25]);
    loader.seek(40).unwrap();
    assert_eq!(loader.next().unwrap(), batches[10]);
    assert_eq!(loader.position(), 44);
    // Another batch size sees the same samples.
    let mut single = Loader::new(mixture(), 41, 1).unwrap();
    assert_eq!(single.next().unwrap().inputs, batches[10].inputs[8..16]);
    assert!(Loader::new(mixture(), 0, 0).is_err());
}
