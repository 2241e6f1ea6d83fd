//! Programs for the pickle machine, written by hand.

use super::*;

fn error(program: &[u8]) -> String {
    Pickle::read(program).unwrap_err()
}

/// A program that makes a tensor named `w` of a storage of `len` floats.
fn tensor(len: u8, offset: u8, shape: &[u8], strides: &[u8]) -> Vec<u8> {
    let tuple = |values: &[u8]| {
        let numbers = values.iter().flat_map(|value| [b'K', *value]);
        [b'('].into_iter().chain(numbers).chain([b't']).collect::<Vec<_>>()
    };
    let text = |text: &str| [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
    let function = b"ctorch._utils\n_rebuild_tensor_v2\n".to_vec();
    let reference = [
        &b"("[..],
        &text("storage"),
        b"ctorch\nFloatStorage\n",
        &text("0"),
        &text("cpu"),
        &[b'K', len],
        b"tQ",
    ];
    let arguments =
        [&[b'K', offset][..], &tuple(shape), &tuple(strides), b"\x89", b"ccollections\nOrderedDict\n)R"];
    let begin = [b"\x80\x02}".to_vec(), text("w"), function, b"(".to_vec()].concat();
    [begin, reference.concat(), arguments.concat(), b"tRs.".to_vec()].concat()
}

fn elements(program: &[u8]) -> Result<Range<u64>, String> {
    let pickle = Pickle::read(program)?;
    let mut tensors = pickle.dict()?.tensors();
    let (name, tensor) = tensors.next().unwrap();
    assert_eq!(name, "w");
    tensor.elements()
}

#[test]
fn a_tensor_is_a_part_of_its_storage() {
    assert_eq!(elements(&tensor(6, 0, &[2, 3], &[3, 1])), Ok(0..6));
    assert_eq!(elements(&tensor(9, 2, &[2, 3], &[3, 1])), Ok(2..8));
    assert_eq!(elements(&tensor(3, 0, &[1, 3], &[99, 1])), Ok(0..3));
    assert_eq!(elements(&tensor(0, 0, &[0], &[1])), Ok(0..0));
}

#[test]
fn a_tensor_that_is_no_part_of_its_storage_is_refused() {
    assert!(elements(&tensor(6, 0, &[2, 3], &[1, 2])).unwrap_err().contains("not contiguous"));
    assert!(elements(&tensor(6, 0, &[2, 3], &[0, 0])).unwrap_err().contains("not contiguous"));
    let short = "6 elements from 0 on in a storage of 5";
    assert_eq!(elements(&tensor(5, 0, &[2, 3], &[3, 1])).unwrap_err(), short);
    assert!(elements(&tensor(6, 1, &[2, 3], &[3, 1])).is_err());
    assert!(error(&tensor(6, 0, &[2, 3], &[3])).contains("shape [2, 3] and strides [3]"));
}

#[test]
fn nothing_else_can_be_asked_for() {
    let said = error(b"\x80\x02cposix\nsystem\nX\x02\0\0\0ls\x85R.");
    assert!(said.contains("asks for posix.system"), "{said}");
    for name in ["builtins\neval", "torch\nload", "torch._utils\n_rebuild_qtensor", "torch\nAStorage"] {
        assert!(error(&[b"\x80\x02c", name.as_bytes(), b"\n."].concat()).contains("asks for"), "{name}");
    }
    // What is allowed is called in one way only.
    assert!(error(b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.").contains("with 1 arguments"));
    assert!(error(b"\x80\x02ctorch\nFloatStorage\n)R.").contains("calls a function"));
    assert!(error(b"\x80\x02}}\x85R.").contains("calls a dictionary"));
    assert!(error(b"\x80\x02ccollections\nOrderedDict\n}b.").contains("BUILD for a function"));
    assert!(error(b"\x80\x02ccollections\nOrderedDict\n)\x81.").contains("NEWOBJ 0x81"));
    assert!(error(b"\x80\x04.").contains("protocol 4"));
    assert!(Pickle::read(b"\x80\x02]K\x01a.").unwrap().dict().unwrap_err().contains("holds a list"));
}

#[test]
fn any_cut_and_any_changed_byte_is_read_or_refused() {
    let whole = tensor(6, 0, &[2, 3], &[3, 1]);
    for len in 0..whole.len() {
        assert!(Pickle::read(&whole[..len]).is_err(), "{len}");
    }
    for place in 0..whole.len() {
        for value in 0..=255 {
            let mut changed = whole.clone();
            changed[place] = value;
            if let Ok(pickle) = Pickle::read(&changed)
                && let Ok(dict) = pickle.dict()
            {
                for (_, tensor) in dict.tensors() {
                    assert!(
                        tensor.elements().is_ok_and(|range| range.end <= 255) || tensor.elements().is_err()
                    );
                }
            }
        }
    }
}

#[test]
fn numbers_of_any_length_are_read() {
    let read = |bytes: &[u8]| {
        let pickle = Pickle::read(&[b"\x80\x02", bytes, b"."].concat())?;
        Ok::<_, String>(pickle.objects[pickle.root].clone())
    };
    assert_eq!(read(b"\x8a\x00"), Ok(Object::Int(0)));
    assert_eq!(read(b"\x8a\x01\xff"), Ok(Object::Int(-1)));
    assert_eq!(read(b"\x8a\x05\0\0\0\0\x01"), Ok(Object::Int(1 << 32)));
    assert_eq!(read(b"J\xff\xff\xff\xff"), Ok(Object::Int(-1)));
    assert!(read(b"\x8a\x09\0\0\0\0\0\0\0\0\x01").unwrap_err().contains("9 bytes"));
}
