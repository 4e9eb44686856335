//! What is read of a file, in order: pieces with data, and runs of whole chunks without.

use std::{fs::File, ops::Range};

use crate::{BLOCK_SIZE, CHUNK, VerityError, io::Extents};

const BLOCK: u64 = BLOCK_SIZE as u64;

/// The next part of a file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// So many whole chunks without data.
    Zeros(u64),
    /// Some chunks with data in them, the file's last one perhaps without.
    Piece(Piece),
}

/// Some chunks in a row.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Its first byte, a multiple of [`CHUNK`].
    pub(crate) at: u64,
    /// Its bytes; a multiple of [`CHUNK`] unless the file ends in it.
    pub(crate) len: u64,
    /// Blocks that may hold other than zeros, counted from the piece's first, ascending and apart.
    pub(crate) runs: Vec<Range<u64>>,
}

impl Piece {
    pub(crate) fn chunks(&self) -> usize {
        usize::try_from(self.len.div_ceil(CHUNK)).unwrap_or(usize::MAX)
    }

    pub(crate) fn blocks(&self) -> usize {
        usize::try_from(self.len.div_ceil(BLOCK)).unwrap_or(usize::MAX)
    }
}

pub(crate) struct Plan<'a> {
    extents: Extents<'a>,
    size: u64,
    at: u64,
}

impl<'a> Plan<'a> {
    pub(crate) fn new(file: &'a File, size: u64) -> Self {
        Self { extents: Extents::new(file, size), size, at: 0 }
    }

    /// The next part, a piece of at most so many chunks; none at the end.
    pub(crate) fn next(&mut self, most: usize) -> Result<Option<Part>, VerityError> {
        if self.at >= self.size {
            return Ok(None);
        }
        let (data, _) = self.extents.from(self.at)?;
        let empty = (data - self.at) / CHUNK;
        if empty > 0 {
            self.at += empty * CHUNK;
            return Ok(Some(Part::Zeros(empty)));
        }
        let limit = self.at.saturating_add(CHUNK * most as u64).min(self.size);
        let (mut end, mut runs, mut next) = (self.at, Vec::<Range<u64>>::new(), self.at);
        while next < limit {
            let (data, hole) = self.extents.from(next)?;
            // A whole chunk without data is better left to a run of zeros.
            if data >= limit || data - data % CHUNK > end {
                break;
            }
            let hole = hole.min(limit);
            let run = (data - self.at) / BLOCK..(hole - self.at).div_ceil(BLOCK);
            match runs.last_mut() {
                Some(last) if last.end >= run.start => last.end = run.end,
                _ => runs.push(run),
            }
            end = hole.next_multiple_of(CHUNK).min(limit);
            next = hole;
        }
        if end == self.at {
            // The last chunk, which is not whole and has no data.
            end = limit;
        }
        let piece = Piece { at: self.at, len: end - self.at, runs };
        self.at = end;
        Ok(Some(Part::Piece(piece)))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn parts(file: &File, size: u64) -> Vec<Part> {
        let mut plan = Plan::new(file, size);
        std::iter::from_fn(|| plan.next(4).unwrap()).collect()
    }

    /// A file with a block of data at each of these blocks.
    fn sparse(size: u64, blocks: &[u64]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        blocks.iter().for_each(|b| file.write_all_at(&[1; BLOCK_SIZE], b * BLOCK).unwrap());
        file
    }

    #[test]
    fn holes_are_runs_and_pieces_end_at_chunks() {
        let size = 100 * CHUNK + 5000;
        let file = sparse(size, &[128 * 3 + 7, 128 * 4, 128 * 5 + 127, 128 * 50, 128 * 98]);
        let piece = |at: u64, chunks: u64, runs: &[(u64, u64)]| {
            let runs = runs.iter().map(|&(from, to)| from..to).collect();
            Part::Piece(Piece { at: at * CHUNK, len: chunks * CHUNK, runs })
        };
        let want = [
            Part::Zeros(3),
            piece(3, 3, &[(7, 8), (128, 129), (383, 384)]),
            Part::Zeros(44),
            piece(50, 1, &[(0, 1)]),
            Part::Zeros(47),
            piece(98, 1, &[(0, 1)]),
            Part::Zeros(1),
            Part::Piece(Piece { at: 100 * CHUNK, len: 5000, runs: vec![] }),
        ];
        assert_eq!(parts(&file, size), want);
    }

    #[test]
    fn the_parts_of_any_file_are_the_whole_file() {
        for size in [0, 1, 4096, CHUNK - 1, CHUNK, CHUNK + 1, 9 * CHUNK, 9 * CHUNK + 77] {
            for blocks in [&[][..], &[0], &[0, 2, 130, 600, 1000]] {
                let blocks: Vec<u64> = blocks.iter().copied().filter(|b| (b + 1) * BLOCK <= size).collect();
                let file = sparse(size, &blocks);
                let (mut at, mut found) = (0, Vec::new());
                for part in parts(&file, size) {
                    match part {
                        Part::Zeros(n) => at += n * CHUNK,
                        Part::Piece(p) => {
                            assert!(p.at == at && p.len > 0 && p.len <= 4 * CHUNK);
                            found.extend(p.runs.iter().cloned().flatten().map(|b| at / BLOCK + b));
                            at += p.len;
                        }
                    }
                }
                assert_eq!(at, size);
                assert_eq!(found, blocks);
            }
        }
    }

    #[test]
    fn a_file_system_that_tells_no_holes_has_none() {
        let file = File::open("/proc/self/maps").unwrap();
        let parts = parts(&file, CHUNK);
        assert_eq!(parts, [Part::Piece(Piece { at: 0, len: CHUNK, runs: vec![Range { start: 0, end: 128 }] })]);
    }
}
