//! Raw bytes in the body of a frame: one byte that says of which stream they are, then
//! the bytes. JSON would write a byte as up to four characters.
//!
//! A stream's number is below 9, and no JSON document begins with such a byte: a body is
//! never read as the other kind.

use crate::frame::FrameError;

/// The stream numbers of `exec` are the descriptors of the program.
pub const STDIN: u8 = 0;
/// See [`STDIN`].
pub const STDOUT: u8 = 1;
/// See [`STDIN`].
pub const STDERR: u8 = 2;
/// Bytes of a log file.
pub const LOG: u8 = 3;

/// Appends a piece of 1 to `limit` bytes to `body`.
pub fn write(body: &mut Vec<u8>, stream: u8, bytes: &[u8], limit: usize) -> Result<(), FrameError> {
    check(bytes, limit)?;
    body.push(stream);
    body.extend_from_slice(bytes);
    Ok(())
}

/// The bytes in `body` if it is a piece of `stream`; they are 1 to `limit`.
pub fn read(body: &[u8], stream: u8, limit: usize) -> Result<Option<Vec<u8>>, FrameError> {
    match body.split_first() {
        Some((first, bytes)) if *first == stream => {
            check(bytes, limit)?;
            Ok(Some(bytes.to_vec()))
        }
        _ => Ok(None),
    }
}

fn check(bytes: &[u8], limit: usize) -> Result<(), FrameError> {
    let length = bytes.len();
    if (1..=limit).contains(&length) {
        return Ok(());
    }
    Err(FrameError::Piece { length, limit })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_has_one_byte_to_its_limit() {
        for (length, fits) in [(0, false), (1, true), (5, true), (6, false)] {
            let mut body = Vec::new();
            let bytes = vec![7; length];
            assert_eq!(write(&mut body, STDERR, &bytes, 5).is_ok(), fits);
            let body = [vec![STDERR], bytes.clone()].concat();
            match read(&body, STDERR, 5) {
                Ok(taken) => assert_eq!((fits, taken), (true, Some(bytes))),
                Err(FrameError::Piece { limit, .. }) => assert_eq!((fits, limit), (false, 5)),
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(read(&[STDOUT, 7], STDERR, 5).unwrap(), None);
        assert_eq!(read(&[], STDERR, 5).unwrap(), None);
    }
}
