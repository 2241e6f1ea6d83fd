//! Compares what adapters need of a backend with plain f64 implementations, and the noise of dropout with its definition.

use ulmus_backend::{
    Dropout, DropoutPart, LinearShape, LowRank, TrainingBackend, ViewMut, dropout_keeps, dropout_row,
    dropout_threshold,
};
use ulmus_plan::ROW_BLOCK;

use crate::kernels::{BACKWARD, Device, FORWARD, all, all_mut, assert_close, check, random, wide};

/// Tests the kernels.
pub(crate) fn conform<B: TrainingBackend>(device: &Device<B>) {
    accumulated_products(device);
    scattered_rows(device);
    cleared_embedding(device);
    dropout(device);
    gains(device);
    scaled_columns(device);
    frozen_table(device);
}

fn sum(a: &[f32], b: &[f32]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) + f64::from(*b)).collect()
}

fn accumulated_products<B: TrainingBackend>(device: &Device<B>) {
    let shape = LinearShape { rows: 21, inputs: 5, outputs: 34 };
    let LinearShape { rows, inputs, outputs } = shape;
    let (x, weight, upstream) =
        (random(rows * inputs, 1), random(outputs * inputs, 2), random(rows * outputs, 3));
    let (x_, weight_, upstream_) = (device.acts(&x), device.params(&weight), device.acts(&upstream));
    for backward in [false, true] {
        let len = if backward { rows * inputs } else { rows * outputs };
        let product = |into: ViewMut<'_, B::Activations>, accumulate| {
            let weight = all(&weight_, outputs * inputs);
            if backward {
                device.0.linear_backward_input(
                    into,
                    all(&upstream_, rows * outputs),
                    weight,
                    shape,
                    accumulate,
                );
            } else {
                device.0.linear(into, all(&x_, rows * inputs), weight, shape, accumulate);
            }
        };
        let alone = device.fill_acts(len, |into| product(into, false));
        let before = random(len, 4);
        let mut into = device.acts(&before);
        product(all_mut(&mut into, len), true);
        assert_close("an accumulated product", &device.get_acts(&into, len), &sum(&alone, &before), FORWARD);
        device.0.scale(all_mut(&mut into, len), -0.75);
        let scaled: Vec<f64> = sum(&alone, &before).iter().map(|x| -0.75 * x).collect();
        assert_close("a scaled product", &device.get_acts(&into, len), &scaled, FORWARD);
    }
}

fn scattered_rows<B: TrainingBackend>(device: &Device<B>) {
    for width in [7, 16] {
        let (x, rows, count) = (random(3 * width, 1), [4, 0, 2], 6);
        let (x_, rows_) = (device.acts(&x), device.put(&rows));
        let out = device.fill_acts(count * width, |out| {
            device.0.scatter(out, all(&x_, x.len()), all(&rows_, 3), width);
        });
        for (row, out) in out.chunks(width).enumerate() {
            let from = rows.iter().position(|to| *to as usize == row);
            let expected = from.map_or_else(|| vec![0.0; width], |from| x[from * width..][..width].to_vec());
            assert_eq!(out, expected, "row {row}");
        }
        let mut back = device.acts(&vec![f32::NAN; x.len()]);
        let out_ = device.acts(&out);
        device.0.gather(all_mut(&mut back, x.len()), all(&out_, out.len()), all(&rows_, 3), width);
        assert_eq!(device.get_acts(&back, x.len()), x);
        let before = random(x.len(), 2);
        let mut added = device.acts(&before);
        device.0.gather_add(all_mut(&mut added, x.len()), all(&out_, out.len()), all(&rows_, 3), width);
        assert_close("added rows", &device.get_acts(&added, x.len()), &sum(&x, &before), FORWARD);
    }
}

fn cleared_embedding<B: TrainingBackend>(device: &Device<B>) {
    let (vocabulary, width, ids) = (5, 3, [1, 4, 1]);
    let upstream = random(ids.len() * width, 1);
    let (upstream_, ids_) = (device.acts(&upstream), device.put(&ids));
    let gradient = device.fill(vocabulary * width, |into| {
        device.0.embed_backward(into, all(&upstream_, upstream.len()), all(&ids_, ids.len()), width, false);
    });
    let mut expected = vec![0.0; vocabulary * width];
    for (upstream, id) in wide(&upstream).chunks(width).zip(ids) {
        expected[id as usize * width..][..width].iter_mut().zip(upstream).for_each(|(sum, x)| *sum += x);
    }
    assert_close("the gradient of a table alone", &gradient, &expected, FORWARD);
}

fn dropout<B: TrainingBackend>(device: &Device<B>) {
    let (sequences, length, rate, key) =
        ([3_u64, 1 << 40 | 5], ROW_BLOCK / 2 + 3, 0.3, 0xfedc_ba98_7654_3210);
    let words: Vec<u32> =
        sequences.iter().flat_map(|number| [*number as u32, (number >> 32) as u32]).collect();
    let words_ = device.put(&words);
    // Not all positions have a row, and rows are in any order.
    let positions: Vec<u32> = (0..(sequences.len() * length) as u32).rev().filter(|at| at % 5 != 1).collect();
    let (rows, positions_) = (positions.len(), device.put(&positions));
    for width in [5, 64] {
        let (x, before) = (random(rows * width, 1), random(rows * width, 2));
        let (threshold, factor) = dropout_threshold(rate);
        let kept = |index: usize| {
            let (row, column) = (index / width, (index % width) as u32);
            let position = positions[row] as usize;
            let row = dropout_row(key, sequences[position / length], (position % length) as u64);
            if dropout_keeps(row, column, threshold) { f64::from(factor) } else { 0.0 }
        };
        let x_ = device.acts(&x);
        for part in [DropoutPart::Kept, DropoutPart::Rest] {
            for accumulate in [false, true] {
                let mut out = device.acts(&if accumulate { before.clone() } else { vec![f32::NAN; x.len()] });
                let (sequences, positions) = (all(&words_, words.len()), all(&positions_, rows));
                let noise = Dropout { sequences, length, positions, key, rate };
                let into = all_mut(&mut out, x.len());
                device.0.dropout(into, all(&x_, x.len()), noise, width, part, accumulate);
                let expected: Vec<f64> = (0..x.len())
                    .map(|index| {
                        let (factor, x) = (kept(index), f64::from(x[index]));
                        let own = if part == DropoutPart::Kept { x * factor } else { x * (1.0 - factor) };
                        own + if accumulate { f64::from(before[index]) } else { 0.0 }
                    })
                    .collect();
                let found = device.get_acts(&out, x.len());
                assert_close("dropout", &found, &expected, FORWARD);
                if part == DropoutPart::Kept && !accumulate {
                    let is_zero = |index: usize| found[index] == 0.0;
                    assert!(
                        (0..x.len()).all(|index| is_zero(index) == (kept(index) == 0.0 || x[index] == 0.0))
                    );
                }
            }
        }
    }
}

fn gains<B: TrainingBackend>(device: &Device<B>) {
    let (inputs, outputs, rank, scale) = (41, 70, 3, 1.5_f32);
    let (mut weight, a, mut b) =
        (random(outputs * inputs, 1), random(rank * inputs, 2), random(outputs * rank, 3));
    let magnitude = random(outputs, 4);
    // A row of zeros stays one.
    weight[5 * inputs..6 * inputs].fill(0.0);
    b[5 * rank..6 * rank].fill(0.0);
    // The norms of another row are those of the weights alone.
    b[7 * rank..8 * rank].fill(0.0);
    let squares: Vec<f32> = weight
        .chunks(inputs)
        .map(|row| row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() as f32)
        .collect();
    let (weight_, a_, b_, magnitude_) =
        (device.params(&weight), device.params(&a), device.params(&b), device.params(&magnitude));
    let squares_ = device.put(&squares);
    let mut scratch = device.put(&vec![f32::NAN; (2 * outputs + rank) * rank]);
    let scratch = all_mut(&mut scratch, (2 * outputs + rank) * rank);
    let found = device.fill(2 * outputs, |gains| {
        let matrix = LowRank {
            weight: all(&weight_, weight.len()),
            a: all(&a_, a.len()),
            b: all(&b_, b.len()),
            scale,
            inputs,
        };
        device.0.gains(gains, all(&magnitude_, outputs), all(&squares_, outputs), matrix, scratch);
    });
    let norms: Vec<f64> = (0..outputs)
        .map(|row| {
            let element = |column: usize| {
                let product: f64 =
                    (0..rank).map(|k| f64::from(b[row * rank + k]) * f64::from(a[k * inputs + column])).sum();
                f64::from(weight[row * inputs + column]) + f64::from(scale) * product
            };
            (0..inputs).map(|column| element(column).powi(2)).sum::<f64>().sqrt()
        })
        .collect();
    let of = |f: &dyn Fn(usize) -> f64, zero: f64| -> Vec<f64> {
        (0..outputs).map(|row| if norms[row] == 0.0 { zero } else { f(row) }).collect()
    };
    let gains = of(&|row| f64::from(magnitude[row]) / norms[row], 1.0);
    let inverse = of(&|row| 1.0 / norms[row], 0.0);
    assert_close("gains", &found, &[gains, inverse].concat(), FORWARD);
    // Without a product, the norm is exactly the root of the square: an adapter that changes nothing has gains of 1.
    assert_eq!(found[outputs + 7], 1.0 / squares[7].sqrt());
}

fn scaled_columns<B: TrainingBackend>(device: &Device<B>) {
    for width in [9, 80] {
        let rows = ROW_BLOCK + 5;
        let (x, upstream, before) =
            (random(rows * width, 1), random(rows * width, 2), random(rows * width, 3));
        let (gains, inverse) = (random(width, 4), random(width, 5));
        let gains_ = device.put(&[gains.clone(), inverse.clone()].concat());
        let (x_, upstream_) = (device.acts(&x), device.acts(&upstream));
        let scaled = |x: &[f32]| -> Vec<f64> {
            x.iter().enumerate().map(|(i, x)| f64::from(*x) * f64::from(gains[i % width])).collect()
        };
        let out = device.fill_acts(x.len(), |out| {
            device.0.scale_columns(out, all(&x_, x.len()), all(&gains_, width), false);
        });
        assert_close("scaled columns", &out, &scaled(&x), FORWARD);
        let mut added = device.acts(&before);
        device.0.scale_columns(all_mut(&mut added, x.len()), all(&x_, x.len()), all(&gains_, width), true);
        assert_close("added columns", &device.get_acts(&added, x.len()), &sum(&out, &before), FORWARD);

        let mut x_gradient = device.acts(&vec![f32::NAN; x.len()]);
        let magnitude_gradient = device.fill(width, |into| {
            device.0.scale_columns_backward(
                all_mut(&mut x_gradient, x.len()),
                into,
                all(&upstream_, x.len()),
                all(&x_, x.len()),
                all(&gains_, 2 * width),
            );
        });
        assert_close("their gradient", &device.get_acts(&x_gradient, x.len()), &scaled(&upstream), FORWARD);
        // As a function of magnitudes, of which the gains are magnitudes times inverse norms.
        let reference = |given: &[Vec<f64>]| {
            let gain = |column: usize| given[0][column] * f64::from(inverse[column]);
            x.iter().enumerate().map(|(i, x)| f64::from(*x) * gain(i % width)).collect::<Vec<f64>>()
        };
        let magnitudes: Vec<f32> = gains.iter().zip(&inverse).map(|(gain, inverse)| gain / inverse).collect();
        check("magnitudes", reference, &[&magnitudes], &out, &upstream, &[&magnitude_gradient]);
    }
}

/// Weights of rows scale their gradients, and a frozen table or norm changes nothing else.
fn frozen_table<B: TrainingBackend>(device: &Device<B>) {
    let shape = LinearShape { rows: 6, inputs: 8, outputs: 21 };
    let LinearShape { rows, inputs, outputs } = shape;
    let (hidden, table, weights) = (random(rows * inputs, 1), random(outputs * inputs, 2), random(rows, 3));
    let (hidden_, table_, weights_) = (device.acts(&hidden), device.params(&table), device.put(&weights));
    let targets = device.put(&[0, 3, 20, 7, 7, 1]);
    let gradient = |weighted: bool| {
        let (mut ce, mut lse) = (device.put(&vec![f32::NAN; rows]), device.put(&vec![f32::NAN; rows]));
        let mut logits = device.put(&vec![f32::NAN; 4 * outputs]);
        device.fill_acts(rows * inputs, |hidden| {
            let gradients = ulmus_backend::HeadGradients {
                hidden,
                table: None,
                row_weights: weighted.then(|| all(&weights_, rows)),
                z_loss: 0.0,
            };
            device.0.head_loss(
                all_mut(&mut ce, rows),
                all_mut(&mut lse, rows),
                Some(gradients),
                all(&hidden_, rows * inputs),
                all(&table_, outputs * inputs),
                all(&targets, rows),
                all_mut(&mut logits, 4 * outputs),
                shape,
            );
        })
    };
    let expected: Vec<f64> = (gradient(false).iter().enumerate())
        .map(|(i, x)| f64::from(*x) * f64::from(weights[i / inputs]))
        .collect();
    assert_close("gradients of weighted rows", &gradient(true), &expected, BACKWARD);
}
