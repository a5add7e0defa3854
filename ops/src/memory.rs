//! The system's allocator, told what servers need of it.

/// What a heap may keep of memory that is free at its end: half of this, in bytes, is the largest
/// block that still comes from a heap.
const KEPT: usize = 2 * 1024 * 1024;

/// Lets the allocator keep some freed memory for the next piece of bulk.
///
/// glibc gives memory back as soon as 128 KiB are free at a heap's end, and bulk then takes a page
/// fault for each page of each buffer: 10 % of its CPU. That bound follows the largest block ever
/// given back, as mallopt(3) says of M_MMAP_THRESHOLD: it becomes twice its size. So one is taken
/// and given back. Elsewhere than with glibc that does nothing. Call it before the first thread.
pub fn keep_freed() {
    let block: Vec<u8> = Vec::with_capacity(KEPT / 2);
    // Seen by somebody, or the compiler leaves both out.
    std::hint::black_box(&block);
}
