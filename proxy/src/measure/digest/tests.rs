//! One read for all who want the same bytes, and none that is not whole.

use std::{path::Path, sync::mpsc};

use super::*;

const IMAGE: FileDigestAlg = FileDigestAlg::FsVerity;

/// A file whose last change counts as long ago. Without a way to set that time, by waiting for it.
fn settled_file(dir: &Path, size: usize) -> (Arc<File>, Stamp) {
    let path = dir.join("image");
    std::fs::write(&path, vec![7; size]).unwrap();
    let file = File::open(&path).unwrap();
    let stamp = Stamp::from(&file.metadata().unwrap());
    while !settled(&stamp, SystemTime::now()) {
        std::thread::sleep(Duration::from_millis(20));
    }
    (Arc::new(file), stamp)
}

/// A progress that holds the reading up until it is let go, and tells that it does.
fn held() -> (Progress, mpsc::Receiver<()>, mpsc::Sender<()>) {
    let (reading, is_reading) = mpsc::channel();
    let (go, wait) = mpsc::channel::<()>();
    let wait = Mutex::new(wait);
    let progress: Progress = Arc::new(move |_| {
        let _ = reading.send(());
        // Ends with the sender.
        let _ = wait.lock().unwrap_or_else(PoisonError::into_inner).recv();
    });
    (progress, is_reading, go)
}

fn wanted(stamp: Option<Stamp>, progress: Option<Progress>) -> Wanted {
    Wanted { alg: IMAGE, stamp, progress }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_who_ask_at_once_read_once() {
    let dir = tempfile::tempdir().unwrap();
    let (file, stamp) = settled_file(dir.path(), 3 << 20);
    let digester = Digester::default();
    let (progress, reading, go) = held();
    let ask = |progress| {
        let (digester, file) = (digester.clone(), File::open(dir.path().join("image")).unwrap());
        let stamp = Stamp::from(&file.metadata().unwrap());
        tokio::spawn(async move { digester.digest(Arc::new(file), wanted(Some(stamp), progress)).await })
    };
    let first = ask(Some(progress));
    tokio::task::spawn_blocking(move || reading.recv().map(|()| reading)).await.unwrap().unwrap();
    let others: Vec<_> = (0..99).map(|_| ask(None)).collect();
    while digester.readings().iter().map(|r| r.waiting).sum::<usize>() < 100 {
        tokio::task::yield_now().await;
    }
    drop(go);
    let digest = first.await.unwrap().unwrap();
    for other in others {
        assert_eq!(other.await.unwrap().unwrap(), digest);
    }
    assert_eq!(digester.files_read(), 1);
    // Nothing is kept: whoever comes later reads again.
    digester.digest(Arc::clone(&file), wanted(Some(stamp), None)).await.unwrap();
    assert_eq!(digester.files_read(), 2);
    assert!(digester.readings().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn another_stamp_is_another_reading() {
    let dir = tempfile::tempdir().unwrap();
    let (file, stamp) = settled_file(dir.path(), 3 << 20);
    let digester = Digester::default();
    let (progress, reading, go) = held();
    let first = {
        let (digester, file) = (digester.clone(), Arc::clone(&file));
        tokio::spawn(async move { digester.digest(file, wanted(Some(stamp), Some(progress))).await })
    };
    tokio::task::spawn_blocking(move || reading.recv().map(|()| reading)).await.unwrap().unwrap();
    for stamp in [Some(Stamp { mtime: (1, 1), ..stamp }), Some(Stamp { size: 1, ..stamp }), None] {
        let before = digester.files_read();
        digester.digest(Arc::clone(&file), wanted(stamp, None)).await.unwrap();
        assert_eq!(digester.files_read(), before + 1);
    }
    drop(go);
    first.await.unwrap().unwrap();
}

#[test]
fn a_file_that_just_changed_is_not_shared() {
    let stamp = |ctime| Stamp { file: (1, 1), size: 1, mtime: (0, 0), ctime };
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
    for (ctime, want) in
        [((990, 0), true), ((999, 0), false), ((998, 999_999_999), true), ((1001, 0), false), ((0, 0), false)]
    {
        assert_eq!(settled(&stamp(ctime), now), want, "{ctime:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_reading_goes_on_until_the_last_one_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let (file, stamp) = settled_file(dir.path(), 30 << 20);
    let digester = Digester::default();
    let (progress, reading, go) = held();
    let ask = |progress| {
        let (digester, file) = (digester.clone(), Arc::clone(&file));
        tokio::spawn(async move { digester.digest(file, wanted(Some(stamp), progress)).await })
    };
    let (first, second) = (ask(Some(progress)), ask(None));
    let reading = tokio::task::spawn_blocking(move || reading.recv().map(|()| reading)).await.unwrap().unwrap();
    while digester.readings().iter().map(|r| r.waiting).sum::<usize>() < 2 {
        tokio::task::yield_now().await;
    }
    // The one who began it leaves: the other still has his answer, from the same reading.
    first.abort();
    go.send(()).unwrap();
    assert!(!second.is_finished());
    second.abort();
    assert!(second.await.unwrap_err().is_cancelled());
    drop(go);
    // The reader lets go of its callback long before the end of the file: the channel ends.
    tokio::task::spawn_blocking(move || while reading.recv().is_ok() {}).await.unwrap();
    assert_eq!(digester.files_read(), 1);
    assert!(digester.readings().is_empty());
}

#[tokio::test]
async fn a_tampered_tree_means_a_full_reading() {
    use std::os::unix::fs::FileExt as _;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    std::fs::write(&path, vec![7; 5 << 20]).unwrap();
    let file = Arc::new(File::options().read(true).write(true).open(&path).unwrap());
    let tree = Arc::new(tempfile::tempfile().unwrap());
    let digester = Digester::default();
    let ((_, known), saved) = digester.digest_and_save(Arc::clone(&file), Arc::clone(&tree)).await.unwrap();
    assert!(saved);
    let mut changed = Changed::default();
    file.write_all_at(b"changed", 1 << 20).unwrap();
    changed.add(1 << 20..(1 << 20) + 7);
    let want = digester.digest(Arc::clone(&file), wanted(None, None)).await.unwrap();
    assert_ne!(want.1, known);
    let again = async |known, changed: &Changed| {
        let (file, tree) = (Arc::clone(&file), Arc::clone(&tree));
        let updated = digester.digest_changed(file, tree, known, changed.clone()).await.unwrap();
        (updated.digested, updated.read.ok())
    };
    assert_eq!(again(known, &changed).await, (want, Some(4096)));
    // A digest that the tree does not give, and one of another kind.
    assert_eq!(again(want.1, &changed).await, (want, None));
    let plain = FileDigest { alg: FileDigestAlg::Sha256, ..known };
    assert_eq!(again(plain, &changed).await, (want, None));
    // The tree of something else: the change would go unseen if it were believed.
    tree.write_all_at(&[1], 4096 * 3 + 5).unwrap();
    assert_eq!(again(known, &Changed::default()).await, (want, None));
    tree.set_len(0).unwrap();
    assert_eq!(again(known, &changed).await, (want, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_so_many_files_are_read_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let (file, _) = settled_file(dir.path(), 1 << 20);
    let limits = MeasureLimits { parallel: NonZeroUsize::MIN, idle_io: true };
    let digester = Digester::new(limits);
    let (progress, reading, go) = held();
    let ask = |progress| {
        let (digester, file) = (digester.clone(), Arc::clone(&file));
        tokio::spawn(async move { digester.digest(file, wanted(None, progress)).await })
    };
    let first = ask(Some(progress));
    tokio::task::spawn_blocking(move || reading.recv().map(|()| reading)).await.unwrap().unwrap();
    let second = ask(None);
    while digester.readings().len() < 2 {
        tokio::task::yield_now().await;
    }
    assert_eq!(digester.files_read(), 1);
    drop(go);
    assert_eq!(first.await.unwrap().unwrap(), second.await.unwrap().unwrap());
    assert_eq!(digester.files_read(), 2);
}
