//! A container's output on disk: bounded, with the time of each piece, readable while it grows.
//!
//! The output is kept as it came, so that reading it back is a plain copy; times are kept apart,
//! one for each piece that the process wrote, and looked up only when they are asked for.

use std::{
    collections::VecDeque,
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::FileExt as _,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use time::OffsetDateTime;
use tokio::sync::watch;

use crate::json;

/// The output is kept in this many files; the oldest goes when the newest is full.
const SEGMENTS: u64 = 4;
/// Bytes read at once: large enough to stream well, small enough to hold for each reader.
const CHUNK: usize = 128 << 10;
/// Pieces written within this time share one timestamp.
const RESOLUTION: i128 = 1_000_000;
/// Timestamps kept for a file: 1 MiB of them at most.
const MAX_TIMES: usize = 64 << 10;

pub(crate) struct Log {
    directory: PathBuf,
    segment_bytes: u64,
    inner: Mutex<Inner>,
    grown: watch::Sender<()>,
}

struct Inner {
    segments: VecDeque<Segment>,
    next: u64,
    closed: bool,
}

struct Segment {
    id: u64,
    file: Arc<File>,
    path: PathBuf,
    length: u64,
    /// Offset and time (Unix, nanoseconds), both rising.
    times: Vec<(u64, i128)>,
}

impl Log {
    pub(crate) fn new(directory: PathBuf, bytes: u64) -> io::Result<Self> {
        std::fs::create_dir_all(&directory)?;
        Ok(Self {
            directory,
            segment_bytes: (bytes / SEGMENTS).max(CHUNK as u64),
            inner: Mutex::new(Inner {
                segments: VecDeque::new(),
                next: 0,
                closed: false,
            }),
            grown: watch::Sender::new(()),
        })
    }

    /// Appends what the process wrote.
    pub(crate) fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let now = OffsetDateTime::now_utc().unix_timestamp_nanos();
        {
            let mut inner = self.lock();
            if inner
                .segments
                .back()
                .is_none_or(|last| last.length >= self.segment_bytes)
            {
                self.rotate(&mut inner)?;
            }
            let Some(last) = inner.segments.back_mut() else {
                return Ok(());
            };
            (&*last.file).write_all(bytes)?;
            if last
                .times
                .last()
                .is_none_or(|(_, time)| now - time >= RESOLUTION)
            {
                if last.times.len() >= MAX_TIMES {
                    let mut keep = false;
                    last.times.retain(|_| {
                        keep = !keep;
                        keep
                    });
                }
                last.times.push((last.length, now));
            }
            last.length += bytes.len() as u64;
        }
        self.grown.send_replace(());
        Ok(())
    }

    /// No more will come: readers that follow end here.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.grown.send_replace(());
    }

    fn rotate(&self, inner: &mut Inner) -> io::Result<()> {
        let id = inner.next;
        let path = self.directory.join(format!("{id}.log"));
        let file = OpenOptions::new()
            .create(true)
            .read(true)
            .append(true)
            .open(&path)?;
        inner.next += 1;
        inner.segments.push_back(Segment {
            id,
            file: Arc::new(file),
            path,
            length: 0,
            times: Vec::new(),
        });
        while inner.segments.len() as u64 > SEGMENTS {
            if let Some(old) = inner.segments.pop_front() {
                // Readers that have it open read on; the space is free when they are done.
                let _ = std::fs::remove_file(&old.path);
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        for segment in &self.lock().segments {
            let _ = std::fs::remove_file(&segment.path);
        }
    }
}

/// What a reader wants of a log.
#[derive(Debug, Clone, Default)]
pub(crate) struct Options {
    pub(crate) follow: bool,
    pub(crate) timestamps: bool,
    pub(crate) tail: Option<u64>,
    pub(crate) since: Option<OffsetDateTime>,
    pub(crate) limit: Option<u64>,
}

pub(crate) struct Reader {
    log: Arc<Log>,
    options: Options,
    segment: u64,
    offset: u64,
    left: u64,
    line_start: bool,
    grown: watch::Receiver<()>,
}

enum Step {
    Data {
        file: Arc<File>,
        offset: u64,
        length: usize,
        times: Vec<(u64, i128)>,
    },
    Wait,
    End,
}

impl Reader {
    pub(crate) fn new(log: Arc<Log>, options: Options) -> io::Result<Self> {
        let grown = log.grown.subscribe();
        let (segment, offset) = start(&log.lock(), &options)?;
        let left = options.limit.unwrap_or(u64::MAX);
        Ok(Self {
            log,
            options,
            segment,
            offset,
            left,
            line_start: true,
            grown,
        })
    }

    /// The next piece; `None` at the end.
    pub(crate) async fn next(&mut self) -> Option<io::Result<Bytes>> {
        while self.left > 0 {
            self.grown.borrow_and_update();
            match self.step() {
                Step::End => return None,
                Step::Wait => {
                    if self.grown.changed().await.is_err() {
                        return None;
                    }
                }
                Step::Data {
                    file,
                    offset,
                    length,
                    times,
                } => {
                    let mut buffer = vec![0; length];
                    if let Err(error) = file.read_exact_at(&mut buffer, offset) {
                        return Some(Err(error));
                    }
                    self.offset = offset + length as u64;
                    let mut bytes = if self.options.timestamps {
                        self.stamp(&buffer, offset, &times)
                    } else {
                        Bytes::from(buffer)
                    };
                    bytes.truncate(usize::try_from(self.left).unwrap_or(usize::MAX));
                    self.left -= bytes.len() as u64;
                    return Some(Ok(bytes));
                }
            }
        }
        None
    }

    fn step(&mut self) -> Step {
        let inner = self.log.lock();
        // The segment may have been rotated away between two reads: go on with the oldest there is.
        let Some(at) = inner
            .segments
            .iter()
            .position(|segment| segment.id >= self.segment)
        else {
            return if inner.closed || !self.options.follow {
                Step::End
            } else {
                Step::Wait
            };
        };
        let mut segment = &inner.segments[at];
        if segment.id > self.segment {
            (self.segment, self.offset) = (segment.id, 0);
        }
        if self.offset >= segment.length {
            match inner.segments.get(at + 1) {
                Some(next) => {
                    segment = next;
                    (self.segment, self.offset) = (next.id, 0);
                }
                None if inner.closed || !self.options.follow => return Step::End,
                None => return Step::Wait,
            }
        }
        let length = (segment.length - self.offset).min(CHUNK as u64);
        let times = if self.options.timestamps {
            let first = segment
                .times
                .partition_point(|(offset, _)| *offset <= self.offset)
                .saturating_sub(1);
            let last = segment
                .times
                .partition_point(|(offset, _)| *offset < self.offset + length);
            segment.times[first..last.max(first)].to_vec()
        } else {
            Vec::new()
        };
        Step::Data {
            file: Arc::clone(&segment.file),
            offset: self.offset,
            length: usize::try_from(length).unwrap_or(CHUNK),
            times,
        }
    }

    fn stamp(&mut self, buffer: &[u8], offset: u64, times: &[(u64, i128)]) -> Bytes {
        let mut out = Vec::with_capacity(buffer.len() * 2);
        let mut at = 0;
        while at < buffer.len() {
            if self.line_start {
                let here = offset + at as u64;
                let index = times
                    .partition_point(|(offset, _)| *offset <= here)
                    .saturating_sub(1);
                let time = times.get(index).map_or(0, |(_, time)| *time);
                out.extend_from_slice(json::stamp_nanos(time).as_bytes());
                out.push(b' ');
            }
            let end = memchr::memchr(b'\n', &buffer[at..]).map(|found| at + found + 1);
            self.line_start = end.is_some();
            let end = end.unwrap_or(buffer.len());
            out.extend_from_slice(&buffer[at..end]);
            at = end;
        }
        out.into()
    }
}

/// Where a reader begins: after the time it asked for, or the last lines, whichever is later.
fn start(inner: &Inner, options: &Options) -> io::Result<(u64, u64)> {
    let mut begin = inner.segments.front().map_or((0, 0), |first| (first.id, 0));
    if let Some(since) = options.since {
        let since = since.unix_timestamp_nanos();
        let found = inner.segments.iter().find_map(|segment| {
            let times = segment
                .times
                .get(segment.times.partition_point(|(_, time)| *time < since));
            times.map(|(offset, _)| (segment.id, *offset))
        });
        begin = found.unwrap_or_else(|| end_of(inner));
    }
    if let Some(lines) = options.tail {
        begin = begin.max(tail(inner, lines)?);
    }
    Ok(begin)
}

fn end_of(inner: &Inner) -> (u64, u64) {
    inner
        .segments
        .back()
        .map_or((inner.next, 0), |last| (last.id, last.length))
}

/// Goes back from the end, line by line; a last line without its newline counts.
fn tail(inner: &Inner, lines: u64) -> io::Result<(u64, u64)> {
    let end = end_of(inner);
    if lines == 0 {
        return Ok(end);
    }
    let mut left = lines;
    let mut last = true;
    let mut buffer = vec![0; CHUNK];
    for segment in inner.segments.iter().rev() {
        let mut upper = segment.length;
        while upper > 0 {
            let lower = upper.saturating_sub(CHUNK as u64);
            let piece = &mut buffer[..usize::try_from(upper - lower).unwrap_or(0)];
            segment.file.read_exact_at(piece, lower)?;
            for found in memchr::memrchr_iter(b'\n', piece) {
                let at = lower + found as u64 + 1;
                // The newline that ends the very last line begins no other.
                if last && at == segment.length {
                    last = false;
                    continue;
                }
                last = false;
                left -= 1;
                if left == 0 {
                    return Ok((segment.id, at));
                }
            }
            upper = lower;
        }
        last = false;
    }
    Ok(inner.segments.front().map_or(end, |first| (first.id, 0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(bytes: u64) -> (tempfile::TempDir, Arc<Log>) {
        let dir = tempfile::tempdir().unwrap();
        let log = Log::new(dir.path().join("log"), bytes).unwrap();
        (dir, Arc::new(log))
    }

    async fn read(log: &Arc<Log>, options: Options) -> String {
        let mut reader = Reader::new(Arc::clone(log), options).unwrap();
        let mut out = Vec::new();
        while let Some(bytes) = reader.next().await {
            out.extend_from_slice(&bytes.unwrap());
        }
        String::from_utf8(out).unwrap()
    }

    #[tokio::test]
    async fn the_last_lines_and_the_first_bytes() {
        let (_dir, log) = log(1 << 20);
        log.write(b"one\ntwo\nthr").unwrap();
        log.write(b"ee\n").unwrap();
        let tail = |tail| Options {
            tail: Some(tail),
            ..Options::default()
        };
        assert_eq!(read(&log, tail(0)).await, "");
        assert_eq!(read(&log, tail(1)).await, "three\n");
        assert_eq!(read(&log, tail(2)).await, "two\nthree\n");
        assert_eq!(read(&log, tail(9)).await, "one\ntwo\nthree\n");
        log.write(b"part").unwrap();
        assert_eq!(read(&log, tail(2)).await, "three\npart");
        assert_eq!(
            read(
                &log,
                Options {
                    limit: Some(5),
                    ..Options::default()
                }
            )
            .await,
            "one\nt"
        );
    }

    #[tokio::test]
    async fn each_line_has_its_time() {
        let (_dir, log) = log(1 << 20);
        log.write(b"one\ntw").unwrap();
        log.write(b"o\n").unwrap();
        let text = read(
            &log,
            Options {
                timestamps: true,
                ..Options::default()
            },
        )
        .await;
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2);
        for (line, said) in lines.iter().zip(["one", "two"]) {
            let (time, rest) = line.split_once(' ').unwrap();
            assert!(json::parse_time(time).is_some(), "{time}");
            assert_eq!(rest, said);
        }
    }

    #[tokio::test]
    async fn the_oldest_goes_first_and_the_size_is_bounded() {
        let (dir, log) = log(4 * CHUNK as u64);
        let line = [b'x'; 1023]
            .iter()
            .chain(b"\n")
            .copied()
            .collect::<Vec<u8>>();
        for _ in 0..2048 {
            log.write(&line).unwrap();
        }
        log.write(b"end\n").unwrap();
        let files = std::fs::read_dir(dir.path().join("log")).unwrap();
        let size: u64 = files
            .map(|file| file.unwrap().metadata().unwrap().len())
            .sum();
        assert!(size <= 5 * CHUNK as u64, "{size}");
        assert!(read(&log, Options::default()).await.ends_with("x\nend\n"));
    }

    #[tokio::test]
    async fn a_follower_sees_what_comes_and_ends_with_the_log() {
        let (_dir, log) = log(1 << 20);
        let reading = tokio::spawn({
            let log = Arc::clone(&log);
            async move {
                read(
                    &log,
                    Options {
                        follow: true,
                        ..Options::default()
                    },
                )
                .await
            }
        });
        log.write(b"a\n").unwrap();
        tokio::task::yield_now().await;
        log.write(b"b\n").unwrap();
        log.close();
        assert_eq!(reading.await.unwrap(), "a\nb\n");
    }
}
