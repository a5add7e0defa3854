//! SPDY header blocks: name-value pairs in one zlib stream a direction, with a preset dictionary.

use bytes::{Buf as _, BufMut as _, Bytes};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::spdy::FrameError;

/// The largest block that is unpacked.
const MAX_BLOCK: usize = 64 << 10;

/// The words at the front of the dictionary (SPDY protocol, draft 3, section 2.6.10.1), each of
/// which goes in behind its length as four bytes.
const WORDS: &str = "options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges \
    age allow authorization cache-control connection content-base content-encoding content-language content-length \
    content-location content-md5 content-range content-type date etag expect expires from host if-match if-modified-since \
    if-none-match if-range if-unmodified-since last-modified location max-forwards pragma proxy-authenticate \
    proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade user-agent vary via warning \
    www-authenticate method get status 200_OK version HTTP/1.1 url public set-cookie keep-alive origin";

/// What follows the words.
const TAIL: &str = concat!(
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505",
    "203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized",
    "403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable",
    "Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT",
    "chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,",
    "publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
);

fn dictionary() -> Vec<u8> {
    let mut out = Vec::with_capacity(1423);
    for word in WORDS.split_whitespace() {
        let word = word.replace('_', " ");
        out.put_u32(u32::try_from(word.len()).unwrap_or(0));
        out.extend_from_slice(word.as_bytes());
    }
    out.extend_from_slice(TAIL.as_bytes());
    out
}

/// Reads one block as the first of a connection.
pub fn decode_headers(block: &[u8]) -> Result<Vec<(String, String)>, FrameError> {
    Decoder::new().decode(block)
}

/// The headers of one direction of a connection, as they come.
pub struct Decoder(Decompress);

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// At the beginning of a connection.
    #[must_use]
    pub fn new() -> Self {
        Self(Decompress::new(true))
    }

    /// Unpacks one block; the blocks of a connection share their state, so an error is final.
    pub fn decode(&mut self, block: &[u8]) -> Result<Vec<(String, String)>, FrameError> {
        let mut out = Vec::with_capacity(4 << 10);
        let mut rest = block;
        loop {
            let (before_in, before_out) = (self.0.total_in(), self.0.total_out());
            let result = self.0.decompress_vec(rest, &mut out, FlushDecompress::Sync);
            rest = &rest[usize::try_from(self.0.total_in() - before_in)
                .unwrap_or(rest.len())
                .min(rest.len())..];
            match result {
                Ok(Status::StreamEnd) => return Err(FrameError::Headers),
                Ok(_) => {}
                Err(error) if error.needs_dictionary().is_some() => {
                    self.0
                        .set_dictionary(&dictionary())
                        .map_err(|_| FrameError::Headers)?;
                    continue;
                }
                Err(_) => return Err(FrameError::Headers),
            }
            let full = out.len() == out.capacity();
            let progress = self.0.total_in() > before_in || self.0.total_out() > before_out;
            if rest.is_empty() && !full {
                return pairs(&out);
            }
            if !progress && !full {
                return Err(FrameError::Headers);
            }
            if out.len() >= MAX_BLOCK {
                return Err(FrameError::TooLong(out.len()));
            }
            if full {
                out.reserve(4 << 10);
            }
        }
    }
}

fn pairs(mut block: &[u8]) -> Result<Vec<(String, String)>, FrameError> {
    let count = number(&mut block)?;
    let mut out = Vec::new();
    for _ in 0..count {
        let name = string(&mut block)?;
        out.push((name.to_ascii_lowercase(), string(&mut block)?));
    }
    Ok(out)
}

fn number(block: &mut &[u8]) -> Result<usize, FrameError> {
    if block.len() < 4 {
        return Err(FrameError::Headers);
    }
    Ok(block.get_u32() as usize)
}

fn string(block: &mut &[u8]) -> Result<String, FrameError> {
    let length = number(block)?;
    let bytes = block.get(..length).ok_or(FrameError::Headers)?;
    *block = &block[length..];
    String::from_utf8(bytes.to_vec()).map_err(|_| FrameError::Headers)
}

/// The headers of one direction of a connection, as they go.
pub struct Encoder(Compress);

impl Default for Encoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Encoder {
    /// At the beginning of a connection.
    #[must_use]
    pub fn new() -> Self {
        let mut compress = Compress::new(Compression::default(), true);
        // Only a dictionary set too late is refused.
        let _ = compress.set_dictionary(&dictionary());
        Self(compress)
    }

    /// Packs one block.
    pub fn encode(&mut self, pairs: &[(&str, &str)]) -> Bytes {
        let mut block = Vec::new();
        let length = |text: &str| u32::try_from(text.len()).unwrap_or(0);
        block.put_u32(u32::try_from(pairs.len()).unwrap_or(0));
        for (name, value) in pairs {
            for text in [name, value] {
                block.put_u32(length(text));
                block.extend_from_slice(text.as_bytes());
            }
        }
        let mut out = Vec::with_capacity(block.len() + 256);
        // With room to spare one call takes all: the blocks are ours, and small.
        let _ = self.0.compress_vec(&block, &mut out, FlushCompress::Sync);
        out.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dictionary_is_the_specifications() {
        let (mut low, mut high) = (1_u32, 0_u32);
        for byte in dictionary() {
            low = (low + u32::from(byte)) % 65521;
            high = (high + low) % 65521;
        }
        assert_eq!(high << 16 | low, 0xe3c6_a7c2);
    }

    #[test]
    fn blocks_share_their_state() {
        let (mut encoder, mut decoder) = (Encoder::new(), Decoder::new());
        for port in ["80", "81", "82"] {
            let block =
                encoder.encode(&[("streamtype", "data"), ("port", port), ("requestid", "0")]);
            let pairs = decoder.decode(&block).unwrap();
            assert_eq!(pairs[1], ("port".to_owned(), port.to_owned()));
        }
        assert_eq!(decoder.decode(&encoder.encode(&[])).unwrap(), []);
    }

    #[test]
    fn bombs_and_rubbish_are_refused() {
        let zeros = "0".repeat(1 << 20);
        let bomb = {
            let mut compress = Compress::new(Compression::best(), true);
            compress.set_dictionary(&dictionary()).unwrap();
            let mut out = Vec::with_capacity(1 << 16);
            compress
                .compress_vec(zeros.as_bytes(), &mut out, FlushCompress::Sync)
                .unwrap();
            out
        };
        assert!(matches!(
            Decoder::new().decode(&bomb),
            Err(FrameError::TooLong(_))
        ));
        assert_eq!(Decoder::new().decode(b"rubbish"), Err(FrameError::Headers));
        assert_eq!(Decoder::new().decode(b""), Err(FrameError::Headers));
        assert_eq!(pairs(&[0xff, 0xff, 0xff, 0xff]), Err(FrameError::Headers));
        assert_eq!(
            pairs(&[0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff]),
            Err(FrameError::Headers)
        );
    }
}
