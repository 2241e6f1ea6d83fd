//! Chooses the fastest kernel that this processor has for a format, and packs right panels with it.

use half::{bf16, f16};
use ulmus_backend::WeightFormat;

use super::aligned::Line;
use super::panel::{LANES, Lanes, pack, place_of, step};
use super::q8;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512, panel::Kernel};

/// Returns `$body` from the enclosing function, where `$kernel` is this processor's fastest kernel for a format.
macro_rules! by_kernel {
    (match $format:expr, $formats:ident { $($name:ident),* }, $kernel:ident => $body:expr) => {
        match $format {
            $($formats::$name => {
                #[cfg(target_arch = "x86_64")]
                {
                    if let Some($kernel) = $crate::kernels::avx512::$name::detect() {
                        return $body;
                    }
                    if let Some($kernel) = $crate::kernels::avx2::$name::detect() {
                        return $body;
                    }
                }
                let $kernel = $crate::kernels::portable::$name;
                $body
            })*
        }
    };
}
pub(super) use by_kernel;

/// Packs lanes as a right panel in `format`.
pub(super) fn pack_right(format: WeightFormat, to: &mut [Line], lanes: Lanes<'_>) {
    let (depths, lines) = step(format);
    assert_eq!(to.len(), lanes.depths.div_ceil(depths) * lines, "lines of a panel");
    #[cfg(target_arch = "x86_64")]
    match format {
        WeightFormat::F32 => {
            if let Some(kernel) = avx512::F32::detect() {
                return kernel.pack(bytemuck::cast_slice_mut(to), LANES, lanes);
            }
            if let Some(kernel) = avx2::F32::detect() {
                return kernel.pack(bytemuck::cast_slice_mut(to), LANES, lanes);
            }
        }
        WeightFormat::Bf16 => {
            if let Some(kernel) = avx512::Bf16::detect() {
                return kernel.pack(bytemuck::cast_slice_mut(to), LANES, lanes);
            }
            if let Some(kernel) = avx2::Bf16::detect() {
                return avx2::pack_right(kernel, bytemuck::cast_slice_mut(to), lanes);
            }
        }
        WeightFormat::F16 | WeightFormat::Q8_0 => {}
    }
    match format {
        WeightFormat::F32 => pack::<1, f32>(bytemuck::cast_slice_mut(to), LANES, lanes, |x| x),
        WeightFormat::F16 => {
            pack::<1, u16>(bytemuck::cast_slice_mut(to), LANES, lanes, |x| f16::from_f32(x).to_bits());
        }
        WeightFormat::Bf16 => {
            pack::<2, u16>(bytemuck::cast_slice_mut(to), LANES, lanes, |x| bf16::from_f32(x).to_bits());
        }
        WeightFormat::Q8_0 => q8::pack_right(bytemuck::cast_slice_mut(to), lanes),
    }
}

/// Unpacks the first depths of a lane from a right panel.
pub(super) fn unpack(format: WeightFormat, out: &mut [f32], panel: &[Line], lane: usize) {
    match format {
        WeightFormat::F32 => unpack_by::<1, f32>(out, bytemuck::cast_slice(panel), lane, |x| x),
        WeightFormat::F16 => {
            unpack_by::<1, u16>(out, bytemuck::cast_slice(panel), lane, |x| f16::from_bits(x).to_f32());
        }
        WeightFormat::Bf16 => {
            unpack_by::<2, u16>(out, bytemuck::cast_slice(panel), lane, |x| bf16::from_bits(x).to_f32());
        }
        WeightFormat::Q8_0 => q8::unpack(out, bytemuck::cast_slice(panel), lane),
    }
}

fn unpack_by<const STEP: usize, T: Copy>(
    out: &mut [f32],
    from: &[T],
    lane: usize,
    convert: impl Fn(T) -> f32,
) {
    for (depth, out) in out.iter_mut().enumerate() {
        *out = convert(from[place_of::<STEP>(LANES, lane, depth)]);
    }
}
