//! Decompositions of weights that are kept from run to run.

use faer::Mat;
use sha2::{Digest, Sha256};

use crate::cache::{FileCache, Lookup};
use crate::digits::hexadecimal;
use crate::krylov::NotConverged;
use crate::svd::{Decomposition, Request, Svd};
use crate::{HdPissaError, SvdCache, SvdMethod};

/// First bytes of the content of a file. Change the number with the decomposition or the format.
const MAGIC: &[u8] = b"hd-pissa decomposition 1\n";
const EXTENSION: &str = "svd";

/// What the cache of decompositions did for a weight.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CacheUse {
    /// Nothing: there is none, or nothing was decomposed.
    Unused,
    /// The decomposition is that of an earlier run.
    Read,
    /// It was computed, and is kept.
    Written,
    /// It was computed, and replaces a damaged file.
    Replaced,
    /// It was computed, and could not be kept.
    NotKept {
        /// Why.
        reason: String,
    },
}

/// As [`Svd::compute`], unless `cache` has the decomposition; it is kept there.
pub(crate) fn compute(
    request: &Request<'_>,
    cache: Option<&SvdCache>,
    choose: impl FnOnce(&[f64]) -> Result<Vec<usize>, HdPissaError> + Send,
) -> Result<(Svd, CacheUse), HdPissaError> {
    let Some(SvdCache { folder, max_bytes }) = cache else {
        return Ok((Svd::compute(request, choose)?, CacheUse::Unused));
    };
    let files = FileCache::new(folder, EXTENSION, *max_bytes);
    let key = key(request);
    let found = files.read(&key);
    let is_there = found != Lookup::Absent;
    if let Lookup::Found(bytes) = found
        && let Some(svd) = decode(&bytes)
    {
        // Refuses what it refused when the decomposition was computed.
        choose(&svd.values)?;
        return Ok((svd, CacheUse::Read));
    }
    let svd = Svd::compute(request, choose)?;
    let path = request.path;
    let done = match files.write(&key, &encode(&svd)) {
        Ok(()) if is_there => {
            let file = files.path(&key);
            log::warn!("{} was damaged; {path} is decomposed again", file.display());
            CacheUse::Replaced
        }
        Ok(()) => CacheUse::Written,
        Err(error) => {
            let reason = format!("{}: {error}", folder.display());
            log::warn!("the decomposition of {path} is not kept in {reason}");
            CacheUse::NotKept { reason }
        }
    };
    Ok((svd, done))
}

/// A hash of everything that a decomposition depends on. A weight of half precision is decomposed as the
/// `f32` matrix of its values, and has the key of that matrix.
fn key(request: &Request<'_>) -> String {
    let mut hash = Sha256::new();
    hash.update(MAGIC);
    let method = match request.method {
        SvdMethod::Exact(precision) => format!("exact {precision:?}\n"),
        // The start of the space depends on the name.
        SvdMethod::Krylov => format!("krylov {}\n", request.path),
    };
    for text in [env!("CARGO_PKG_VERSION"), &method] {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    }
    let components = request.components.iter().copied();
    let sizes = [request.host.rows(), request.host.cols(), components.len()];
    for number in sizes.into_iter().chain(components) {
        hash.update((number as u64).to_le_bytes());
    }
    let mut bytes = Vec::new();
    for values in request.host.values().chunks(1 << 14) {
        bytes.clear();
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        hash.update(&bytes);
    }
    hexadecimal(&hash.finalize())
}

/// The first bytes, nine numbers of 8 bytes, the singular values in 8 bytes each, and the vectors in 4
/// bytes for each entry, or in 8 where they are of double precision.
fn encode(svd: &Svd) -> Vec<u8> {
    let Svd {
        u,
        v,
        values,
        decomposition,
    } = svd;
    let (kind, failure) = match *decomposition {
        Decomposition::None | Decomposition::Exact => (0, [0; 4]),
        Decomposition::Krylov { dimension } => (1, [dimension as u64, 0, 0, 0]),
        Decomposition::Fallback(NotConverged {
            component,
            residual,
            gap,
            dimension,
        }) => {
            let shares = [residual, gap].map(f64::to_bits);
            let failure = [dimension as u64, component as u64, shares[0], shares[1]];
            (2, failure)
        }
    };
    let entries = || {
        [u, v]
            .into_iter()
            .flat_map(|side| side.col_iter())
            .flat_map(|col| col.iter())
    };
    let is_single = entries().all(|&entry| f64::from(entry as f32) == entry);
    let mut bytes = MAGIC.to_vec();
    let sizes = [u.nrows(), v.nrows(), u.ncols(), values.len()].map(|size| size as u64);
    for number in sizes.into_iter().chain([kind]).chain(failure) {
        bytes.extend(number.to_le_bytes());
    }
    bytes.push(if is_single { 4 } else { 8 });
    for value in values {
        bytes.extend(value.to_le_bytes());
    }
    match is_single {
        true => entries().for_each(|&entry| bytes.extend((entry as f32).to_le_bytes())),
        false => entries().for_each(|&entry| bytes.extend(entry.to_le_bytes())),
    }
    bytes
}

/// `None` for bytes that [`encode`] does not write.
fn decode(bytes: &[u8]) -> Option<Svd> {
    let (numbers, rest) = bytes.strip_prefix(MAGIC)?.split_at_checked(9 * 8)?;
    let mut numbers = numbers
        .as_chunks()
        .0
        .iter()
        .copied()
        .map(u64::from_le_bytes);
    let mut next = || numbers.next();
    let (d_input, d_output, triples, count) = (next()?, next()?, next()?, next()?);
    let [d_input, d_output, triples, count] =
        [d_input, d_output, triples, count].map(|size| size as usize);
    let (kind, dimension, component) = (next()?, next()? as usize, next()? as usize);
    let [residual, gap] = [next()?, next()?].map(f64::from_bits);
    let decomposition = match kind {
        0 => Decomposition::Exact,
        1 => Decomposition::Krylov { dimension },
        2 => Decomposition::Fallback(NotConverged {
            component,
            residual,
            gap,
            dimension,
        }),
        _ => return None,
    };
    let (&width, rest) = rest.split_first()?;
    let (values, entries) = rest.split_at_checked(count.checked_mul(8)?)?;
    let doubles = |bytes: &[u8]| -> Vec<f64> {
        let doubles = bytes.as_chunks().0.iter().copied();
        doubles.map(f64::from_le_bytes).collect()
    };
    let entries = match width {
        4 => {
            let singles = entries.as_chunks().0.iter().copied();
            singles
                .map(|single| f64::from(f32::from_le_bytes(single)))
                .collect()
        }
        8 => doubles(entries),
        _ => return None,
    };
    let of_u = d_input.checked_mul(triples)?;
    if of_u.checked_add(d_output.checked_mul(triples)?)? != entries.len() {
        return None;
    }
    let side = |rows: usize, entries: &[f64]| {
        Mat::from_fn(rows, triples, |row, col| entries[col * rows + row])
    };
    Some(Svd {
        u: side(d_input, &entries[..of_u]),
        v: side(d_output, &entries[of_u..]),
        values: doubles(values),
        decomposition,
    })
}
