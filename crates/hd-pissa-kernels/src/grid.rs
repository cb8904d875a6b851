//! The number of cubes of a launch.

use cubecl::prelude::*;

use crate::KernelError;

/// The grid of `[x, y, z]` cubes.
pub(crate) fn cube_count(client: &Client, cubes: [usize; 3]) -> Result<CubeCount, KernelError> {
    let (x, y, z) = client.properties().hardware.max_cube_count;
    let limit = [x, y, z];
    let cubes = cubes.map(|count| count as u64);
    if (0..3).any(|axis| cubes[axis] > u64::from(limit[axis])) {
        return Err(KernelError::TooManyTiles { cubes, limit });
    }
    let [x, y, z] = cubes.map(|count| count as u32);
    Ok(CubeCount::Static(x, y, z))
}

/// The device's number of multiprocessors; that of a desktop GPU if the device does not report it.
pub(crate) fn multiprocessors(client: &Client) -> usize {
    let hardware = &client.properties().hardware;
    hardware.num_streaming_multiprocessors.unwrap_or(32) as usize
}
