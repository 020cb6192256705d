"""HiFT: mel -> 24 kHz wave, 480 samples per mel frame, in one pass of convolutions. Bound by bytes and launches.

Mel -> pitch -> a source of sines and noise -> the source's spectrogram and the mel through three levels of upsampling
and residual blocks -> spectrum -> wave. Begin with `hift.py`.

    hift.py               weight norm folded in, snake in three passes, the source drawn on the device
    batched.py            mels of different length, each as it is alone
    continued.py          HiFT in windows, its source going on from one to the next
    static_shape.py       HiFT over mels padded to whole buckets, so that CUDA graphs hold it
    triton_hift.py        `decode` with the channels innermost, through the Triton kernels of triton_kernels.py
    cpp_hift.py           convolutions and snakes in C++ (hift.cpp), for a CPU
"""
